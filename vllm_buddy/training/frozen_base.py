"""The frozen base model of a run: whole on every process, or shared out among the processes.

A base that is shared out (`shard_base`) is split by torch's fully_shard into one group for each decoder layer and one
each for embedding and head. `method/sharded.py` says when a group is gathered. The final norm is small and stays whole.
"""

import importlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vllm_buddy.errors import TrainingError
from vllm_buddy.method.sharded import is_split, set_layer_shards
from vllm_buddy.models.folder import load_config, load_model
from vllm_buddy.models.torch_device import torch_dtype
from vllm_buddy.training.stage1_settings import Stage1Settings

# For the slowest stage that one process goes through while others wait, such as the closed-form start of an 8B model.
_LONGEST_WAIT = timedelta(hours=12)
MESH_DIM = "fsdp"  # the name by which peft knows that a module computes its whole output from a shard


def check_packages() -> None:
    """Raise a TrainingError if the package that runs processes and devices is missing."""
    try:
        importlib.import_module("accelerate")
    except ImportError:
        raise TrainingError(
            "training needs accelerate: pip install accelerate, or pip install '.[train]' in a checkout of this package"
        ) from None


def make_accelerator() -> Any:
    """The processes and devices of a run (accelerate.Accelerator)."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)])


def check_processes(settings: Stage1Settings, accelerator: Any) -> None:
    """Raise a TrainingError if the base cannot be shared out among the processes that were started."""
    if not settings.shard_base:
        return
    processes, passes = accelerator.num_processes, settings.batch // settings.micro_batch
    if processes == 1:
        raise TrainingError(
            "shard_base shares the base model out among processes, and there is one; start several with `accelerate "
            "launch --num_processes N -m vllm_buddy train ...`, or leave shard_base out"
        )
    if passes % processes:
        raise TrainingError(
            f"with shard_base all processes run the same number of forward passes, and {passes} (batch / micro_batch) "
            f"cannot be divided among {processes}; change batch, micro_batch or the number of processes"
        )


def load_base(settings: Stage1Settings, folder: Path, accelerator: Any) -> nn.Module:
    """Load the model in `folder` to the process's device, frozen.

    With `shard_base`, each process gets its share. The main process reads the weights and has all of them in host
    memory while it does; the others, and every device, never have more than one group of them at a time.

    Raises:
        ModelError, UnsupportedError: see load_model.
    """
    dtype = torch_dtype(settings.dtype)
    if not settings.shard_base:
        model = load_model(folder, dtype, accelerator.device, settings.base_quantisation)
        return model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):  # processes load differently, and then draw the same random weights
        model = load_model(folder, dtype) if accelerator.is_main_process else _without_weights(folder, dtype)
    model.requires_grad_(False)
    _share_out(model, accelerator.device)
    return model


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that this process has of `model`, while none are gathered."""
    return sum(_here(parameter).nbytes for parameter in model.parameters())


def gathered_bytes(model: nn.Module) -> int:
    """Return the most bytes that gathered weights take beside `base_bytes`; 0 if `model` is not shared out.

    A group is gathered into a buffer and copied from there, or runs while the next one is in the buffer.
    """
    net: Any = model
    modules = [module for module in (net.model.embed_tokens, *net.model.layers, net.lm_head) if is_split(module)]
    return 2 * max((sum(p.nbytes for p in module.parameters()) for module in modules), default=0)


def _without_weights(folder: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype).eval()


def _share_out(model: Any, device: torch.device) -> None:
    """Split the weights of `model`, which the main process has, among all processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),), mesh_dim_names=(MESH_DIM,))
    backbone, head = model.model, model.lm_head
    shares_head = torch.tensor([int(head.weight is backbone.embed_tokens.weight)], device=device)
    torch.distributed.broadcast(shares_head, 0)  # a checkpoint may have two matrices where its configuration has one
    tied = bool(shares_head)
    for module in (backbone.norm, backbone.rotary_emb):
        _receive(module, device)
    for module in (backbone.embed_tokens, *backbone.layers, *([] if tied else [head])):
        _receive(module, device)
        if tied and module is backbone.embed_tokens:
            head.weight = module.weight
            fully_shard([module, head], mesh=mesh, reshard_after_forward=True)
        else:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    set_layer_shards(model, backbone.layers)


def _receive(module: nn.Module, device: torch.device) -> None:
    """Put parameters and buffers of `module` onto `device`, with the values that the main process has."""
    for owner, name, tensor in _tensors(module):
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor.to(device)
        whole = whole.detach().contiguous()
        torch.distributed.broadcast(whole, 0)
        if name in owner._parameters:
            owner.register_parameter(name, nn.Parameter(whole, requires_grad=False))
        else:
            owner.register_buffer(name, whole, persistent=name not in owner._non_persistent_buffers_set)


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for owner in module.modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                yield owner, name, tensor


def _here(parameter: torch.Tensor) -> torch.Tensor:
    """The part of `parameter` that this process has."""
    local: Any = getattr(parameter, "to_local", None)
    return parameter if local is None else local()
