"""The device and the dtype of a measurement with a Hugging Face model."""

from typing import Literal

import torch

from vllm_buddy.errors import ModelError

Dtype = Literal["bfloat16", "float32"]

DEVICE_HELP = "cpu, cuda, cuda:1, ...; auto: the GPU where there is one, else the CPU"


def torch_dtype(name: Dtype) -> torch.dtype:
    """The dtype of that name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def find_device(name: str) -> torch.device:
    """Return the device that a user names; "auto" is the GPU where there is one, else the CPU.

    Raises:
        ModelError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=(device := torch.device(name)))
    # torch raises AssertionError where it is built without CUDA.
    except (RuntimeError, AssertionError):
        known = ", ".join(("auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))))
        raise ModelError(f"no device '{name}'; here are {known}") from None
    return device
