"""Tests that the generated parts of README.md and docs/ agree with the code and the results files."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_generated_parts_are_up_to_date() -> None:
    """Fails if a setting or a result changed and the pages did not."""
    done = subprocess.run([sys.executable, "-m", "tools.readme", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"run `python -m tools.readme`. {done.stderr}"
