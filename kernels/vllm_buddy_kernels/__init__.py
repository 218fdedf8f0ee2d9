"""Triton kernels of vllm_buddy, each beside its plain-PyTorch reference."""

from vllm_buddy_kernels.bypass_rows import bypass_rows, bypass_rows_reference
from vllm_buddy_kernels.gather_rows import gather_rows, gather_rows_reference
from vllm_buddy_kernels.layer_slots import layer_slots, layer_slots_reference
from vllm_buddy_kernels.ops import BypassRows, GatherRows, Kernels, LayerSlots, ScatterRows
from vllm_buddy_kernels.scatter_rows import scatter_rows, scatter_rows_reference
from vllm_buddy_kernels.triton_import import (
    KernelError,
    OutOfResources,
    interpreted,
    require_triton,
    why_unavailable,
)

KERNELS = {
    "triton": Kernels(layer_slots, gather_rows, scatter_rows, bypass_rows),
    "reference": Kernels(layer_slots_reference, gather_rows_reference, scatter_rows_reference, bypass_rows_reference),
}

__all__ = [
    "KERNELS",
    "BypassRows",
    "GatherRows",
    "KernelError",
    "Kernels",
    "LayerSlots",
    "OutOfResources",
    "ScatterRows",
    "bypass_rows",
    "bypass_rows_reference",
    "gather_rows",
    "gather_rows_reference",
    "interpreted",
    "layer_slots",
    "layer_slots_reference",
    "require_triton",
    "scatter_rows",
    "scatter_rows_reference",
    "why_unavailable",
]
