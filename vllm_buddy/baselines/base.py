"""The static pruning methods, by name.

Each method gives one order in which the middle layers are removed, so its layer sets of all depths are nested. The
first and the last layer always run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_buddy.baselines.by_importance import delta_ppl_order, shortgpt_order, taylor_order
from vllm_buddy.baselines.by_position import evenly_spaced_order, random_order, reverse_order
from vllm_buddy.baselines.sleb import sleb_order
from vllm_buddy.errors import BaselineError
from vllm_buddy.method import LayerPath, path_of


@dataclass(frozen=True)
class MeasuredMethod:
    """A method that measures its order on a calibration text.

    order: (model, windows [num_windows, window] of token ids, progress(done, total)) -> the middle layers in order of
        removal.
        A method that searches takes candidates= and note= too, see `sleb_order`.
    tokens: default number of calibration tokens.
    dtype: usual dtype of the model. Gradients of many layers lose more to bf16 than losses do.
    """

    order: Callable[..., list[int]]
    tokens: int
    dtype: torch.dtype = torch.bfloat16
    searches: bool = False


MEASURED = {
    "shortgpt": MeasuredMethod(shortgpt_order, tokens=16384),
    "sleb": MeasuredMethod(sleb_order, tokens=4096, searches=True),
    "delta_ppl": MeasuredMethod(delta_ppl_order, tokens=8192),
    "taylor": MeasuredMethod(taylor_order, tokens=8192, dtype=torch.float32),
}
POSITIONAL: dict[str, Callable[[int, int], list[int]]] = {
    "reverse": reverse_order,
    "evenly_spaced": evenly_spaced_order,
    "random": random_order,
}
STATIC_METHODS = (*MEASURED, *POSITIONAL)


def check_static_method(name: str) -> None:
    """Raise BaselineError if there is no static method `name`; the message lists the known ones."""
    if name not in STATIC_METHODS:
        raise BaselineError(f"unknown static method '{name}'; known are {', '.join(STATIC_METHODS)}")


def static_path(order: Sequence[int], depth: int) -> LayerPath:
    """Return the path of `depth` layers when the middle layers are removed in `order`.

    order: every middle layer once, in order of removal. depth: includes the first and the last layer.
    """
    num_layers = len(order) + 2
    return path_of([0, *order[num_layers - depth :], num_layers - 1])


def static_prior(order: Sequence[int]) -> np.ndarray:
    """Return the rank of each middle layer, highest for the last one removed: [num_layers - 2], float32 in (0, 1)."""
    prior = np.empty(len(order), dtype=np.float32)
    prior[np.array(order) - 1] = (1 + np.arange(len(order))) / (len(order) + 1)
    return prior
