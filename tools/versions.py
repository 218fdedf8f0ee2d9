"""Runs the golden tests with each older version of vLLM that the package supports, each in an environment of its own.

    python -m tools.versions [VERSION ...]      # or: make test-versions; about 20 minutes a version on 2 cores

The environments lie in .venvs/ and are kept. What is compared are the tokens of the plugin with the reference's, for
every family and KV policy, with chunks, preemption, cache hits, drafts and depths per token, over HTTP too; and the
signatures of what the plugin calls, overrides or wraps.
"""

import argparse
import subprocess
import sys

from tools.setup_env import ROOT, has_gpu
from vllm_buddy.serving.compat import TESTED_VLLM

GOLDEN = (
    "tests/serving/test_compat.py",
    "tests/serving/test_patches.py",
    "tests/serving/test_vllm_signatures.py",
    "tests/serving/test_vllm_internals.py",
    "tests/serving/schedule/test_prefix_cache.py",
    "tests/serving/telemetry",
    "tests/serving/worker/test_depth_drafts.py",
    *(
        f"tests/serving/end_to_end/test_{name}.py"
        for name in (
            "golden",
            "full_depth",
            "full_prompt",
            "preemption",
            "independence",
            "strict",
            "token_schedule",
            "speculation",
            "lossless",
            "lossless_sampling",
            "draft_counts",
            "ngram_drafts",
            "server",
        )
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(TESTED_VLLM)}; default: older")
    versions = parser.parse_args().versions or TESTED_VLLM[:-1]
    if unknown := [version for version in versions if version not in TESTED_VLLM]:
        parser.error(f"vLLM {unknown[0]} is not one of {', '.join(TESTED_VLLM)}")
    failed = [version for version in versions if not passes(version)]
    for version in versions:
        print(f"vLLM {version}: {'failed' if version in failed else 'passed'}")
    return 1 if failed else 0


def passes(version: str) -> bool:
    """Whether all golden tests pass with this version of vLLM."""
    folder = ROOT / ".venvs" / f"vllm-{version}"
    device = "cuda" if has_gpu() else "cpu"
    setup = [sys.executable, "tools/setup_env.py", "--device", device, "--vllm", version, "--venv", str(folder)]
    tests = [str(folder / "bin" / "python"), "-m", "pytest", "-n", "2", "--dist", "loadfile", *GOLDEN]
    return all(subprocess.run(command, cwd=ROOT).returncode == 0 for command in (setup, tests))


if __name__ == "__main__":
    sys.exit(main())
