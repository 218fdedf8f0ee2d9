"""Lists the artifacts that are installed with the package."""

from pathlib import Path

from vllm_buddy.artifact.artifact import CONFIG_FILE

SHIPPED_DIR = Path(__file__).parent.parent / "shipped"


def shipped_artifacts() -> dict[str, Path]:
    """Return the folder of each shipped artifact, by name."""
    return {p.name: p for p in sorted(SHIPPED_DIR.iterdir()) if (p / CONFIG_FILE).is_file()}
