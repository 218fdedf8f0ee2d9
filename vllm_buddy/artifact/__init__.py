"""The artifact: what training writes and serving loads.

`artifact.py` has the artifact in memory and on disk, `config.py` the schema of its configuration, `fingerprint.py` the
identity of its base model, `provenance.py` the record of how it was made.
"""

from vllm_buddy.artifact.artifact import (
    CONFIG_FILE,
    SHIPPED_DIR,
    WEIGHTS_FILE,
    Artifact,
    RepairKind,
    artifact_folder,
    load_artifact,
    shipped_artifacts,
)

__all__ = [
    "CONFIG_FILE",
    "SHIPPED_DIR",
    "WEIGHTS_FILE",
    "Artifact",
    "RepairKind",
    "artifact_folder",
    "load_artifact",
    "shipped_artifacts",
]
