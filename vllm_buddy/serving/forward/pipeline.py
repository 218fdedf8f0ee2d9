"""Pipeline parallelism: which layers a worker holds, and what it hands to the worker with the layers behind them.

vLLM hands on hidden states and residual of all rows. Beside them goes the count of layers that each row has executed so
far, because vLLM takes the output of a step from the last stage alone.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

_HIDDEN, _RESIDUAL, _EXECUTED = "hidden_states", "residual", "buddy_executed"  # the first two are vLLM's names


def stage_of(num_layers: int) -> slice:
    """The layers of this worker's stage, of a model of num_layers."""
    group = get_pp_group()
    return slice(*get_pp_indices(num_layers, group.rank_in_group, group.world_size))


def is_here(layer: Any) -> bool:
    """Whether this worker holds a layer. vLLM puts a module without weights in the place of others."""
    return not isinstance(layer, PPMissingLayer)


def with_counts(empty_tensors: Callable[..., IntermediateTensors]) -> Callable[..., IntermediateTensors]:
    """vLLM's `make_empty_intermediate_tensors` of a model, with room for the counts."""

    def make(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        tensors = empty_tensors(batch_size, dtype, device)
        tensors.tensors[_EXECUTED] = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return tensors

    return make


def hand_on(
    hidden: torch.Tensor, residual: torch.Tensor | None, executed: torch.Tensor | None = None
) -> IntermediateTensors:
    """What the next stage gets.

    hidden, residual: [num_tokens, hidden_size]; residual None: hidden is the whole state.
    executed: [num_tokens], layers so far; None in profiling and dummy runs, which count nothing.
    """
    if residual is None:
        residual = torch.zeros_like(hidden)
    if executed is None:
        executed = torch.zeros(len(hidden), dtype=torch.int32)
    return IntermediateTensors(
        {_HIDDEN: hidden, _RESIDUAL: residual, _EXECUTED: executed.to(hidden.device, torch.int32, non_blocking=True)}
    )


def states_of(tensors: IntermediateTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and residual after the stage before."""
    return tensors[_HIDDEN], tensors[_RESIDUAL]


def executed_of(tensors: IntermediateTensors) -> torch.Tensor:
    """[num_tokens] int32, layers executed per row in the stages before."""
    return tensors[_EXECUTED]
