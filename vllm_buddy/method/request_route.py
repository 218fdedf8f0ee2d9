"""Decides when a request is routed again, and keeps the path of each of its tokens."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from vllm_buddy.method.path import LayerPath
from vllm_buddy.method.router import Router


class Run(NamedTuple):
    """Consecutive tokens of one request that execute the same path."""

    num_tokens: int
    path: LayerPath


@dataclass(frozen=True)
class PathSchedule:
    """How often a request is routed, and which tokens a decision may use.

    The first decision uses all tokens of the context (the prompt, unless the request names a shorter context), and its
    path runs for the whole context. After the context there is a new decision every `interval` tokens.

    interval: R. 1 routes before every token, as the paper does; 0 keeps the first path.
    lag: the decision for the token at position p uses tokens up to p - lag. 0 includes the token itself. Under
        asynchronous scheduling that token is not on the host yet, so the lag is 1. The lag is fixed and does not
        depend on which tokens have arrived, so the path is a function of the token ids.
    """

    interval: int = 16
    lag: int = 0

    def __post_init__(self) -> None:
        if self.interval < 0 or self.lag < 0:
            raise ValueError(f"interval and lag must not be negative: {self}")


class Route(Protocol):
    """The paths of one request, decided in order of position and never revised.

    depth: layers of each token, or of the mean token. first_path: of the first token. lowered: (position, depth from
    there on), see `lower`.
    """

    @property
    def depth(self) -> int: ...

    @property
    def lowered(self) -> list[tuple[int, int]]: ...

    @property
    def first_path(self) -> LayerPath: ...

    @property
    def cache_key(self) -> str | None:
        """What the paths depend on beside the token ids; requests with equal keys may share KV. None: full depth."""
        ...

    @property
    def uniform_length(self) -> int | None:
        """Number of tokens whose KV can be shared by requests with equal ids and `cache_key`; None: all so far."""
        ...

    @property
    def limits_sharing(self) -> bool:
        """Whether decisions can end what is shared: they must then be made before KV is shared."""
        ...

    @property
    def num_decisions(self) -> int:
        """How often a path was chosen so far, the first one among them, whether or not it was another one."""
        ...

    @property
    def num_reroutes(self) -> int:
        """How often the path changed so far, from one position to the next."""
        ...

    def num_changes(self, after: int) -> int:
        """Number of changes of the path at positions beyond `after`, as far as they are decided."""
        ...

    def distinct_paths(self, start: int = 0) -> set[LayerPath]:
        """The paths of positions from `start` on, as far as they are decided."""
        ...

    def lower(self, depth: int, position: int, token_ids: Sequence[int]) -> bool:
        """Run `depth` layers, or so many in the mean, from `position` on, if the route can.

        position: after all positions whose runs were requested; earlier positions keep their path. token_ids: the
        request's, prompt first.

        Returns:
            False if it cannot; nothing changes then.

        Raises:
            ValueError: `depth` is not below the current depth.
        """
        ...

    def decide(self, end: int, token_ids: Sequence[int]) -> None:
        """Make all decisions for positions below `end`. token_ids: the request's tokens, prompt first.

        Raises:
            RuntimeError: a decision needs a token that is not in `token_ids`.
        """
        ...

    def copy(self) -> "Route":
        """A route with the same decisions so far. It decides apart from this one: on drafts, which may be rejected."""
        ...

    def runs(self, start: int, num_tokens: int, token_ids: Sequence[int]) -> list[Run]:
        """The runs that cover positions [start, start + num_tokens), num_tokens at least 1, in order.

        Decides what is not decided yet: see `decide`, which has the arguments and errors.
        """
        ...


class SplitRoute:
    """A route of the prompt, and another one of the tokens after it.

    decoded: its positions are those of the request; it is asked for none below the prompt's length.
    """

    def __init__(self, prompt: Route, decoded: Route, num_prompt_tokens: int) -> None:
        self._prompt, self.decoded, self._split = prompt, decoded, num_prompt_tokens
        self._changes: bool | None = None  # whether the path changes after the prompt; None: nothing is decided there
        self.first_path = prompt.first_path

    @property
    def depth(self) -> int:
        return self.decoded.depth

    @property
    def lowered(self) -> list[tuple[int, int]]:
        return self.decoded.lowered

    @property
    def cache_key(self) -> str | None:
        return self._prompt.cache_key

    @property
    def uniform_length(self) -> int | None:
        return min(self._prompt.uniform_length or self._split, self._split)

    @property
    def limits_sharing(self) -> bool:
        return self._prompt.limits_sharing

    @property
    def num_decisions(self) -> int:
        return self._prompt.num_decisions + self.decoded.num_decisions

    @property
    def num_reroutes(self) -> int:
        """Number of changes of the path, the one after the prompt among them."""
        return self.num_changes(0)

    def num_changes(self, after: int) -> int:
        """See Route."""
        at_the_split = self._changes is True and after < self._split
        return self._prompt.num_changes(after) + at_the_split + self.decoded.num_changes(max(after, self._split))

    def distinct_paths(self, start: int = 0) -> set[LayerPath]:
        """See Route."""
        decoded = set() if self._changes is None else self.decoded.distinct_paths(max(start, self._split))
        return self._prompt.distinct_paths(start) | decoded

    def lower(self, depth: int, position: int, token_ids: Sequence[int]) -> bool:
        """See RequestRoute.lower; a position within the prompt is not lowered."""
        return position >= self._split and self.decoded.lower(depth, position, token_ids)

    def copy(self) -> "SplitRoute":
        """See Route."""
        result = SplitRoute(self._prompt.copy(), self.decoded.copy(), self._split)
        result._changes = self._changes
        return result

    def decide(self, end: int, token_ids: Sequence[int]) -> None:
        """See Route."""
        self._prompt.decide(min(end, self._split), token_ids)
        if end > self._split:
            self._decide_after_prompt(end, token_ids)

    def _decide_after_prompt(self, end: int, token_ids: Sequence[int]) -> None:
        self.decoded.decide(end, token_ids)
        if self._changes is None:
            last, first = self._prompt.runs(self._split - 1, 1, token_ids), self.decoded.runs(self._split, 1, token_ids)
            self._changes = last[0].path != first[0].path

    def runs(self, start: int, num_tokens: int, token_ids: Sequence[int]) -> list[Run]:
        """See Route."""
        inside = max(0, min(start + num_tokens, self._split) - start)
        runs = self._prompt.runs(start, inside, token_ids) if inside else []
        if num_tokens > inside:
            self._decide_after_prompt(start + num_tokens, token_ids)
            runs += self.decoded.runs(start + inside, num_tokens - inside, token_ids)
        return runs


class RequestRoute:
    """The paths of one request, decided in order of position and never revised.

    Paths depend only on the router, the schedule, the depth, the token ids and calls of `lower`. They do not depend on
    other requests in the batch, chunked prefill, the state of the cache or preemption. Decisions are kept, so a request
    that is computed again after a preemption runs the same paths.

    num_context_tokens: number of prompt tokens that the first decision uses, at least one. The rest of the prompt is
        routed like decoded tokens. None: the whole prompt.
    """

    def __init__(
        self,
        router: Router,
        schedule: PathSchedule,
        depth: int,
        prompt_token_ids: Sequence[int],
        num_context_tokens: int | None = None,
    ) -> None:
        if num_context_tokens is None:
            num_context_tokens = len(prompt_token_ids)
        if not 1 <= num_context_tokens <= len(prompt_token_ids):
            raise ValueError(f"{num_context_tokens} context tokens of a prompt of {len(prompt_token_ids)}")
        self.depth = depth
        self.lowered: list[tuple[int, int]] = []  # (position, depth from there on)
        self._num_context_tokens = num_context_tokens
        self._router = router
        self._schedule = schedule
        self._context = router.new_context() if depth < router.num_layers else None
        if self._context is not None:
            self._context.extend(prompt_token_ids[:num_context_tokens])
        self.first_path = router.path(self._context, depth)
        self._starts = [0]
        self._paths = [self.first_path]
        self.num_decisions = 1
        interval = schedule.interval if self._context is not None else 0
        self._next_decision: int | None = num_context_tokens if interval else None

    @property
    def cache_key(self) -> str | None:
        """The first path; None at full depth."""
        return None if self.first_path == self._router.full else f"{self.first_path:x}"

    @property
    def num_reroutes(self) -> int:
        """Number of changes of the path."""
        return len(self._paths) - 1

    def num_changes(self, after: int) -> int:
        """See Route."""
        return sum(start > after for start in self._starts)

    def distinct_paths(self, start: int = 0) -> set[LayerPath]:
        """See Route."""
        ends = [*self._starts[1:], math.inf]
        return {path for path, end in zip(self._paths, ends) if end > start}

    @property
    def uniform_length(self) -> int | None:
        """Number of tokens before the first change of the path; None while the path has not changed."""
        return self._starts[1] if len(self._starts) > 1 else None

    @property
    def limits_sharing(self) -> bool:
        return True

    def lower(self, depth: int, position: int, token_ids: Sequence[int]) -> bool:
        """Run only `depth` layers of the current path from `position` on.

        A layer that the current path skips would have no keys and values of the preceding tokens.

        For arguments see Route.

        Returns:
            False if the library has no such path; nothing changes then.

        Raises:
            ValueError: `depth` is not below the current depth, or the path changes after `position` already.
        """
        if depth >= self.depth:
            raise ValueError(f"{depth} layers are not less than {self.depth}")
        if position < self._starts[-1]:
            raise ValueError(f"the path changes at position {self._starts[-1]}, which is after {position}")
        if self._context is None:
            self._context = self._router.new_context()
            if self._context is not None:
                self._context.extend(token_ids[: self._num_context_tokens])
        decided = self._starts[-1] == position > 0  # a decision for `position` itself has run nothing yet
        path = self._router.path_within(self._context, depth, self._paths[-2 if decided else -1])
        if path is None:
            return False
        if decided:
            del self._starts[-1], self._paths[-1]
        self._starts.append(position)
        self._paths.append(path)
        self.depth = depth
        self.lowered.append((position, depth))
        if self._context is not None and self._schedule.interval:
            self._next_decision = max(self._next_decision or 0, position + self._schedule.interval)
        return True

    def copy(self) -> "RequestRoute":
        """See Route."""
        result = copy.copy(self)
        result.lowered, result._starts, result._paths = [*self.lowered], [*self._starts], [*self._paths]
        result._context = None if self._context is None else self._context.copy()
        return result

    def decide(self, end: int, token_ids: Sequence[int]) -> None:
        """See Route."""
        while self._next_decision is not None and self._next_decision < end:
            start = self._next_decision
            context = self._context
            assert context is not None
            seen = max(context.num_tokens, start - self._schedule.lag + 1)
            if seen > len(token_ids):
                raise RuntimeError(f"the path at position {start} needs {seen} tokens, {len(token_ids)} are known")
            context.extend(token_ids[context.num_tokens : seen])
            path = self._router.path(context, self.depth)
            self.num_decisions += 1
            if path != self._paths[-1]:
                self._starts.append(start)
                self._paths.append(path)
            self._next_decision = start + self._schedule.interval

    def runs(self, start: int, num_tokens: int, token_ids: Sequence[int]) -> list[Run]:
        """See Route."""
        end = start + num_tokens
        self.decide(end, token_ids)
        runs = []
        index = len(self._starts) - 1
        while self._starts[index] > start:
            index -= 1
        while start < end:
            stop = self._starts[index + 1] if index + 1 < len(self._starts) else end
            runs.append(Run(min(stop, end) - start, self._paths[index]))
            start, index = min(stop, end), index + 1
        return runs
