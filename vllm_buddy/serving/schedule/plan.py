"""The plan: the paths of all tokens of one engine step, sent from the scheduler to every worker."""

from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple, overload

from vllm_buddy.method import LayerPath, Route, Run


class LayerPlaces(NamedTuple):
    """Where the layers of a request lie with KV units (see method/kv_units.py).

    unit: [num_layers], whose blocks a layer uses; -1: no token ran the layer yet.
    first_block: [num_layers], the first block of that unit that holds tokens of the layer.
    """

    unit: tuple[int, ...]
    first_block: tuple[int, ...]


class RequestPlan(NamedTuple):
    """What one request executes in one step.

    runs: cover the tokens scheduled for it, in order of position.
    num_prompt: how many of the tokens, at the beginning, belong to the prompt.
    num_drafts: how many of the tokens, at the end, are drafts of a speculator. Some may be rejected; the next step then
        begins before them.
    wanted_ngrams, wanted_drafts: drafts to make after the step, for the next one, of n-grams and on the model's own
        layers (see draft_pace.py).
    cached_path: set in the step in which the request starts, or resumes after a preemption: the one path that all its
        tokens found in the prefix cache have executed. None in all other steps.
    places: with KV units, set in the step in which the request starts or resumes, and where it takes up a layer.
    """

    runs: tuple[Run, ...]
    cached_path: LayerPath | None
    num_prompt: int = 0
    num_drafts: int = 0
    wanted_ngrams: int = 0
    wanted_drafts: int = 0
    places: LayerPlaces | None = None


def runs_with_drafts(
    route: Route, start: int, num_tokens: int, token_ids: Sequence[int], drafts: Sequence[int]
) -> list[Run]:
    """Runs of tokens of which the last ones are drafts: what the request will run if all are accepted.

    They are decided on a copy, so that no decision that is kept has seen a draft. vLLM pads drafts with -1, which is
    never accepted; such tokens run on with the one before them.
    """
    real = list(takewhile(lambda token_id: token_id >= 0, drafts))
    known, num_padded = _Joined(token_ids, real), len(drafts) - len(real)
    *runs, last = route.copy().runs(start, num_tokens - num_padded, known)
    return [*runs, Run(last.num_tokens + num_padded, last.path)]


class _Joined(Sequence[int]):
    """Two sequences one after the other, without a copy of the first: contexts are long, and routes read their ends."""

    def __init__(self, first: Sequence[int], second: Sequence[int]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        num_first = len(self._first)
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                return [self[index] for index in range(start, stop, step)]
            return [*self._first[start:stop], *self._second[max(0, start - num_first) : max(0, stop - num_first)]]
        place = range(len(self))[place]
        return self._first[place] if place < num_first else self._second[place - num_first]


StepPlan = dict[str, RequestPlan]

# Attributes of vLLM's SchedulerOutput, and of its ModelRunnerOutput on the way back.
PLAN_ATTRIBUTE = "buddy_plan"
EXECUTED_ATTRIBUTE = "buddy_executed"


class Executed(NamedTuple):
    """Layers that a request's tokens executed in one step, counted where they ran.

    num_tokens, total, fewest, most: of the tokens that are no drafts. drafts: layers of each draft, in order.
    prompt_tokens, prompt_total: of those, the ones that belong to the prompt.
    drafting: layers executed after the step, to draft for the next one.
    """

    num_tokens: int
    total: int
    fewest: int
    most: int
    drafts: tuple[int, ...] = ()
    drafting: int = 0
    prompt_tokens: int = 0
    prompt_total: int = 0
