"""Static pruning, the baseline that routing is compared to: every request of one depth runs the same layers.

`base.py` lists the methods (`by_importance.py`, `by_position.py`, `sleb.py`), `orders.py` stores their results, and
`pruning.py` writes a pruned model as a checkpoint (`pruned_checkpoint.py`) and as an artifact (`static_artifact.py`).
"""

from vllm_buddy.baselines.base import (
    MEASURED,
    POSITIONAL,
    STATIC_METHODS,
    check_static_method,
    static_path,
    static_prior,
)
from vllm_buddy.baselines.orders import (
    LayerOrder,
    OrderFile,
    find_order,
    layer_order,
    measure_order,
    shipped_orders,
)
from vllm_buddy.baselines.pruned_checkpoint import save_pruned_checkpoint
from vllm_buddy.baselines.pruning import PrunedModel, prune, save_pruned
from vllm_buddy.baselines.static_artifact import bare_artifact, static_artifact, with_fixed_paths
from vllm_buddy.baselines.static_settings import OrdersSettings, PruneSettings

__all__ = [
    "MEASURED",
    "POSITIONAL",
    "STATIC_METHODS",
    "LayerOrder",
    "OrderFile",
    "OrdersSettings",
    "PruneSettings",
    "PrunedModel",
    "bare_artifact",
    "check_static_method",
    "find_order",
    "layer_order",
    "measure_order",
    "prune",
    "save_pruned",
    "save_pruned_checkpoint",
    "shipped_orders",
    "static_artifact",
    "static_path",
    "static_prior",
    "with_fixed_paths",
]
