"""Static pruning, the baseline to beat."""

from vllm_buddy.baselines.base import MEASURED, POSITIONAL, STATIC_METHODS, check_static_method, static_path
from vllm_buddy.baselines.orders import LayerOrder, OrderFile, layer_order, measure_order, shipped_orders
from vllm_buddy.baselines.pruned_checkpoint import save_pruned_checkpoint

__all__ = [
    "MEASURED",
    "POSITIONAL",
    "STATIC_METHODS",
    "LayerOrder",
    "OrderFile",
    "check_static_method",
    "layer_order",
    "measure_order",
    "save_pruned_checkpoint",
    "shipped_orders",
    "static_path",
]
