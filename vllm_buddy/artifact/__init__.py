"""The artifact: what training writes and serving loads.

`artifact.py` holds the artifact in memory and on disk, `tensors.py` the layout of its weights, `config.py` the schema
of its configuration, `fingerprint.py` the identity of its base model, `shipped.py` and `resolve.py` where artifacts
are found, `provenance.py` the record of how an artifact was made.
"""

from vllm_buddy.artifact.artifact import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Artifact,
    RepairKind,
    load_artifact,
)
from vllm_buddy.artifact.resolve import artifact_folder
from vllm_buddy.artifact.shipped import SHIPPED_DIR, shipped_artifacts

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
