"""Imports Triton if it is installed, and otherwise a stand-in that lets kernel modules be imported.

The plain-PyTorch references beside the kernels need torch alone, so their modules must not require Triton.
"""

import os
from types import ModuleType
from typing import Any

import torch

__all__ = ["KernelError", "OutOfResources", "interpreted", "require_triton", "tl", "triton", "why_unavailable"]


class KernelError(ValueError):
    """A kernel cannot run on this machine or on these tensors."""


class _Absent(ModuleType):
    """Stands in for Triton: its decorators do nothing and its annotations are empty."""

    constexpr = None

    @staticmethod
    def jit(function: Any = None, **_: Any) -> Any:
        return function if function is not None else (lambda decorated: decorated)


try:
    import triton
    import triton.language as tl
    from triton.runtime.errors import OutOfResources
except ImportError:
    triton = tl = _Absent("triton")

    class OutOfResources(Exception):  # type: ignore[no-redef]
        """Triton's: the device has too little shared memory, or too few registers, for a kernel."""


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which an environment variable chooses before the import."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_unavailable(device: torch.device) -> str | None:
    """Return why kernels cannot run on tensors of this device, or None if they can."""
    if isinstance(triton, _Absent):
        return "Triton is not installed"
    if device.type != "cuda" and not interpreted():
        return f"Triton's kernels need a CUDA device, not {device.type} (or, to test them, TRITON_INTERPRET=1)"
    return None


def require_triton(device: torch.device) -> None:
    """Raise KernelError if kernels cannot run on tensors of this device."""
    reason = why_unavailable(device)
    if reason is not None:
        raise KernelError(f"{reason}; the plain-PyTorch references do the same, more slowly")
