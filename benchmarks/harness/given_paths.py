"""Lets a benchmark choose the path of each request, which it recognises by the first token of its prompt."""

import math
from collections.abc import Sequence
from functools import reduce
from operator import or_

import numpy as np

from benchmarks.harness.engines import Variant
from benchmarks.harness.lineup import Lineup
from vllm_buddy.method import Context, LayerPath, Router, budget_for_depth, path_of

_ATTEMPTS = 1000


def draw_paths(
    rng: np.random.Generator, num_paths: int, depth: int, num_layers: int, union: int | None = None
) -> list[LayerPath]:
    """Draw distinct random paths of `depth` layers, each with the first and the last layer.

    union: number of layers that any of the paths runs; these layers are random too. None: not restricted.

    Raises:
        ValueError: there are no such paths, or random attempts do not find them.
    """
    middle = np.arange(1, num_layers - 1)
    if union is not None:
        middle = rng.choice(middle, union - 2, replace=False)
    if num_paths <= math.comb(len(middle), depth - 2):
        for _ in range(_ATTEMPTS):
            paths: list[LayerPath] = []
            while len(paths) < num_paths:
                path = path_of([0, *rng.choice(middle, depth - 2, replace=False).tolist(), num_layers - 1])
                if path not in paths:
                    paths.append(path)
            if union in (None, union_of(paths).bit_count()):
                return paths
    raise ValueError(f"found no {num_paths} paths of {depth} layers, together {union or 'any'} of {num_layers}")


def union_of(paths: Sequence[LayerPath]) -> LayerPath:
    """Return the layers that at least one of the paths runs."""
    return reduce(or_, paths)


class GivenPaths(Router):
    """A router that gives request i the path i modulo their number, at the cost of a Decision Module.

    asked: the router whose Decision Module is evaluated; its answer is ignored. paths: all of one depth.
    first_token: first token of the prompt of request 0; the prompt of request i begins with first_token + i.
    """

    def __init__(self, asked: Router, paths: Sequence[LayerPath], first_token: int) -> None:
        super().__init__(asked.num_layers, np.zeros(asked.num_layers - 2), asked.decision)
        self.paths = list(paths)
        self._first_token = first_token

    def new_context(self) -> Context:
        assert self.decision is not None
        return _FirstToken(self.decision.table_context)

    def path(self, context: Context | None, depth: int) -> LayerPath:
        picked = super().path(context, depth)
        if depth == self.num_layers:
            return picked
        assert isinstance(context, _FirstToken)
        assert context.first is not None
        path = self.paths[(context.first - self._first_token) % len(self.paths)]
        if path.bit_count() != depth:
            raise ValueError(f"a path of {depth} layers is asked for, those given have {path.bit_count()}")
        return path


class _FirstToken(Context):
    """A context that remembers its request's first token."""

    first: int | None = None

    def extend(self, token_ids: Sequence[int]) -> None:
        if self.first is None and len(token_ids) > 0:
            self.first = int(token_ids[0])
        super().extend(token_ids)


def on_paths(lineup: Lineup, paths: Sequence[LayerPath], name: str, *, bypass: bool = True) -> Variant:
    """Return a buddy variant with request i on path i modulo their number; it needs prompts from `draw_prompts`."""
    depth = paths[0].bit_count()
    return Variant(
        name=name,
        layers=depth,
        llm=lineup.buddy,
        budget=budget_for_depth(depth, lineup.num_layers),
        router=GivenPaths(lineup.router, paths, _first_token(lineup)),
        bypass=bypass,
    )


def draw_prompts(lineup: Lineup, rng: np.random.Generator, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Draw random prompts whose first tokens tell GivenPaths which request each belongs to."""
    prompts = lineup.draw_prompts(rng, num_prompts, num_tokens)
    return [[_first_token(lineup) + i, *prompt[1:]] for i, prompt in enumerate(prompts)]


def _first_token(lineup: Lineup) -> int:
    return lineup.vocab_size // 10  # after the special tokens
