"""Quantises models in the formats of checkpoints that users have, by rounding to the nearest value.

For speed and for tests: no calibration, so a larger model would lose quality that good tools keep.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

GROUP = 32  # inputs that share a scale, in the 4-bit formats
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns that one int32 holds


def quantise(folder: Path, out: Path, kind: str) -> Path:
    """Write the model in `folder` with its linear layers quantised; returns `out`. kind: a key of FORMATS."""
    form = FORMATS[kind]
    _rewrite(folder, out, form.pack)
    model = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(model | {"quantization_config": form.config}))
    return out


def round_off(folder: Path, out: Path, kind: str) -> Path:
    """Write the model in `folder` with the weights that `quantise` leaves, in its own dtype; returns `out`."""
    _rewrite(folder, out, lambda weight: {"weight": FORMATS[kind].rounded(weight)})
    return out


def round_activations(model: nn.Module, kind: str) -> None:
    """Let a Hugging Face model that `round_off` wrote round what its matrices are multiplied with, if the format does.

    It then computes what engines compute on the quantised model, up to the order of sums.
    """
    form = FORMATS[kind]
    for name, module in model.named_modules():
        if form.activations and name.endswith("_proj"):
            module.register_forward_pre_hook(lambda _, inputs: (form.rounded(inputs[0]),))


def _rewrite(folder: Path, out: Path, change: Callable[[torch.Tensor], dict[str, torch.Tensor]]) -> None:
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            changed = change(weight.float())
            tensors |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in changed.items()}
        else:
            tensors[name] = weight
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _scaled(packed: dict[str, torch.Tensor]) -> torch.Tensor:
    return packed["weight"].float() * packed["weight_scale"]


def _grouped(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] of `_in_groups`."""
    return ((values - 8) * scales.float().repeat_interleave(GROUP, dim=0)).T.contiguous()


def _int8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _fp8(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    kind = torch.float8_e4m3fn
    scale = weight.abs().amax(dim=1, keepdim=True) / torch.finfo(kind).max
    return {"weight": (weight / scale).to(kind), "weight_scale": scale}


def _in_groups(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values 0 to 15, of which 8 is zero, [in, out] int64; their scales, [in / GROUP, out] float16."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(dim=2, keepdim=True) / 7).half()
    values = (groups / scale.float()).round().clamp(-8, 7).flatten(1) + 8
    return values.T.long().contiguous(), scale.squeeze(2).T.contiguous()


def _packed(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack eight neighbours of the last dimension into one int32, the one at order[i] into bits 4 i and up."""
    eight = values.unflatten(-1, (-1, 8))
    bits = sum(eight[..., place] << (4 * number) for number, place in enumerate(order))
    assert isinstance(bits, torch.Tensor)
    return torch.where(bits >= 2**31, bits - 2**32, bits).int()


def _gptq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scales = _in_groups(weight)
    zeros = torch.full_like(scales, 7, dtype=torch.int64)  # the format adds one
    return {
        "qweight": _packed(values.T.contiguous()).T.contiguous(),
        "qzeros": _packed(zeros),
        "scales": scales,
        "g_idx": (torch.arange(len(values)) // GROUP).int(),
    }


def _awq(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    values, scales = _in_groups(weight)
    zeros = torch.full_like(scales, 8, dtype=torch.int64)
    return {"qweight": _packed(values, AWQ_ORDER), "qzeros": _packed(zeros, AWQ_ORDER), "scales": scales}


def _compressed(kind: str) -> dict[str, Any]:
    """The configuration of compressed-tensors: 8 bits, a scale per output and per token. kind: "int" or "float"."""
    numbers = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**numbers, "strategy": "channel", "dynamic": False},
        "input_activations": {**numbers, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Format:
    """A format of weights.

    pack: the tensors of a matrix [out, in] by name. rounded: the matrix that they stand for. config: of checkpoints.
    activations: whether what a matrix is multiplied with, [num_tokens, in], is rounded in the same way.
    """

    pack: Callable[[torch.Tensor], dict[str, torch.Tensor]]
    rounded: Callable[[torch.Tensor], torch.Tensor]
    config: dict[str, Any]
    activations: bool = False


FORMATS = {
    "compressed-tensors W8A8": Format(_int8, lambda w: _scaled(_int8(w)), _compressed("int"), activations=True),
    "compressed-tensors FP8": Format(_fp8, lambda w: _scaled(_fp8(w)), _compressed("float"), activations=True),
    "GPTQ": Format(
        _gptq,
        lambda w: _grouped(*_in_groups(w)),
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
    ),
    "AWQ": Format(
        _awq,
        lambda w: _grouped(*_in_groups(w)),
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
}
