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
    with_drafts,
    with_token_router,
)
from vllm_buddy.artifact.config import (
    FORMAT_VERSION,
    BuddyConfig,
    LoraConfig,
    PredictorConfig,
    PricePoint,
    PriorConfig,
)
from vllm_buddy.artifact.fingerprint import NO_WEIGHTS, BaseModelIdentity, identify, weight_fingerprint
from vllm_buddy.artifact.provenance import (
    CARD_FILE,
    RUN_FILE,
    card_origin,
    card_title,
    command_line,
    run_header,
    source_commit,
    to_yaml,
)
from vllm_buddy.artifact.resolve import resolve_artifact
from vllm_buddy.artifact.shipped import SHIPPED_DIR, shipped_artifacts

__all__ = [
    "CARD_FILE",
    "CONFIG_FILE",
    "FORMAT_VERSION",
    "NO_WEIGHTS",
    "RUN_FILE",
    "SHIPPED_DIR",
    "WEIGHTS_FILE",
    "Artifact",
    "BaseModelIdentity",
    "BuddyConfig",
    "LoraConfig",
    "PredictorConfig",
    "PricePoint",
    "PriorConfig",
    "RepairKind",
    "card_origin",
    "card_title",
    "command_line",
    "identify",
    "load_artifact",
    "resolve_artifact",
    "run_header",
    "shipped_artifacts",
    "source_commit",
    "to_yaml",
    "weight_fingerprint",
    "with_drafts",
    "with_token_router",
]
