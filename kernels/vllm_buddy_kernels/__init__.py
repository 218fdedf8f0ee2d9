"""Triton kernels of vllm_buddy, each beside its plain-PyTorch reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_buddy_kernels.bypass_rows import bypass_rows, bypass_rows_reference
from vllm_buddy_kernels.gather_rows import gather_rows, gather_rows_reference
from vllm_buddy_kernels.layer_slots import layer_slots, layer_slots_reference
from vllm_buddy_kernels.scatter_rows import scatter_rows, scatter_rows_reference
from vllm_buddy_kernels.triton_import import KernelError, interpreted, require_triton, why_unavailable


@dataclass(frozen=True)
class Kernels:
    """The ops that serving uses, in one of their two forms."""

    layer_slots: Callable[..., Any]
    gather_rows: Callable[..., Any]
    scatter_rows: Callable[..., Any]
    bypass_rows: Callable[..., Any]


KERNELS = {
    "triton": Kernels(layer_slots, gather_rows, scatter_rows, bypass_rows),
    "reference": Kernels(layer_slots_reference, gather_rows_reference, scatter_rows_reference, bypass_rows_reference),
}

__all__ = [
    "KERNELS",
    "KernelError",
    "Kernels",
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
