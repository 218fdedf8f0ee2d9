"""Batches whose requests run given paths, told apart by the first token of their prompts."""

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
    """Distinct random paths of `depth` layers, the first and the last always among them.

    union: how many layers they have together, which are random too; None: as many as it comes to.

    Raises:
        ValueError: there are no such paths, or chance does not find them.
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
    """The layers that any of the paths runs."""
    return reduce(or_, paths)


class GivenPaths(Router):
    """Gives request i path i modulo their number, at the price of a Decision Module.

    asked: the router whose Decision Module is asked, though not obeyed. paths: all of one depth.
    first_token: what the prompt of request 0 begins with; that of request i begins with first_token + i.
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
    """A context that knows its request's first token."""

    first: int | None = None

    def extend(self, token_ids: Sequence[int]) -> None:
        if self.first is None and len(token_ids) > 0:
            self.first = int(token_ids[0])
        super().extend(token_ids)


def on_paths(lineup: Lineup, paths: Sequence[LayerPath], name: str, *, bypass: bool = True) -> Variant:
    """Buddy with request i on path i modulo their number; for prompts from `draw_prompts`."""
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
    """The line-up's random prompts, but for the first tokens, by which GivenPaths tells requests apart."""
    prompts = lineup.draw_prompts(rng, num_prompts, num_tokens)
    return [[_first_token(lineup) + i, *prompt[1:]] for i, prompt in enumerate(prompts)]


def _first_token(lineup: Lineup) -> int:
    return lineup.vocab_size // 10  # behind the special ones
