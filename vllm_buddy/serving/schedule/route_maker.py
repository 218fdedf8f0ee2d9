"""Makes the route of an arriving request, by the schedules of prompts and of decoded tokens."""

from collections.abc import Iterable, Sequence

from vllm_buddy.artifact import Artifact
from vllm_buddy.errors import SettingsError
from vllm_buddy.method import (
    PathSchedule,
    RequestRoute,
    Route,
    Router,
    SplitRoute,
    TokenRoute,
    TokenRouter,
    TokenSchedule,
    depth_for_budget,
)
from vllm_buddy.method.kv_policy import MASKED, ZERO
from vllm_buddy.method.token_router import see_newest
from vllm_buddy.serving.start.settings import BuddySettings


class RouteMaker:
    """Routers and schedules of one server.

    router, schedule: of requests that run one depth. tokens, token_schedule: of tokens with depths of their own; None
        if the artifact has none. by_token: whether prompts, and decoded tokens, have depths per token.
        shares_one_path: see TokenRoute.
    """

    def __init__(
        self,
        router: Router,
        schedule: PathSchedule,
        token_schedule: TokenSchedule,
        tokens: TokenRouter | None,
        by_token: tuple[bool, bool],
        *,
        shares_one_path: bool = False,
    ) -> None:
        self.router = router
        self.schedule = schedule
        self.token_schedule = token_schedule
        self._tokens = tokens
        self._by_token = by_token
        self._shares_one_path = shares_one_path

    @classmethod
    def of(cls, settings: BuddySettings, artifact: Artifact, lag: int) -> "RouteMaker":
        """The one that the settings ask for. lag: see PathSchedule."""
        return cls(
            artifact.router(library=settings.library),
            artifact.schedule(settings.route_every, lag),
            TokenSchedule(settings.schedule.saved_layers, lag),
            artifact.token,
            (settings.schedule.prefill == "token", settings.schedule.decode == "token"),
            shares_one_path=settings.kv == MASKED,
        )

    def route(
        self,
        budget: float,
        token_ids: Sequence[int],
        num_prompt_tokens: int,
        num_context: int | None,
        *,
        full_prompt: bool = False,
    ) -> Route:
        """The route of a request.

        num_context: prompt tokens that decide the path of a request of one depth. full_prompt: whether the prompt runs
            all layers, and the budget is one of the tokens after it.
        """
        depth = depth_for_budget(budget, self.router.num_layers)
        if full_prompt and depth < self.router.num_layers:
            whole = self._of_request(self.router.num_layers, token_ids, None)
            return SplitRoute(whole, self._after_full_prompt(budget, depth, token_ids), num_prompt_tokens)
        by_token = self._by_token
        # Below the shallowest of the nested paths there is nothing to choose.
        if self._tokens is None or depth < self._tokens.depths[0] or depth == self.router.num_layers:
            by_token = (False, False)
        prompt, decoded = by_token
        if not prompt and not decoded:
            return self._of_request(depth, token_ids, num_context)
        assert self._tokens is not None
        if prompt and decoded:
            return self._of_tokens(self._tokens, budget, token_ids)
        if prompt:
            in_prompt = self._of_tokens(self._tokens, budget, token_ids)
            return SplitRoute(in_prompt, self._of_request(depth, token_ids, num_context), num_prompt_tokens)
        after = self._of_tokens(self._tokens, budget, token_ids, start=num_prompt_tokens)
        return SplitRoute(self._of_request(depth, token_ids, num_context), after, num_prompt_tokens)

    def see_newest(self, asked: Iterable[tuple[Route, Sequence[int]]]) -> None:
        """Let routes of single tokens see the tokens that the last step sampled, all at once.

        Each would do so when it is asked for its runs, at many times the cost. asked: routes with their token ids.
        """
        if not any(self._by_token):
            return
        found = []
        for route, token_ids in asked:
            single = route.decoded if isinstance(route, SplitRoute) else route
            if isinstance(single, TokenRoute) and single.sees_next(token_ids):
                found.append((single, token_ids[-1]))
        if len(found) > 1:
            see_newest(*zip(*found))

    def _after_full_prompt(self, budget: float, depth: int, token_ids: Sequence[int]) -> Route:
        tokens = self._tokens
        if self._by_token[1] and tokens is not None and depth >= tokens.depths[0]:
            return self._of_tokens(tokens, budget, token_ids, start=len(token_ids))
        return self._of_request(depth, token_ids, None)

    def _of_tokens(self, tokens: TokenRouter, budget: float, token_ids: Sequence[int], start: int = 0) -> TokenRoute:
        return TokenRoute(tokens, self.token_schedule, budget, token_ids, start, shares_one_path=self._shares_one_path)

    def _of_request(self, depth: int, token_ids: Sequence[int], num_context: int | None) -> RequestRoute:
        return RequestRoute(self.router, self.schedule, depth, token_ids, num_context)


def check_schedule(settings: BuddySettings, artifact: Artifact) -> None:
    """Refuse depths per token where they cannot be had.

    Raises:
        SettingsError: the artifact has no nested paths, or the KV policy is `zero`.
    """
    if not settings.schedule.by_token:
        return
    if artifact.token is None:
        raise SettingsError(
            f"schedule \"token\": artifact '{artifact.config.name}' has no nested paths to choose from for each token; "
            'train one with `schedule: token`, or set prefill and decode to "request"'
        )
    if settings.kv == ZERO:
        raise SettingsError(
            'schedule "token" cannot be had with kv_policy "zero": deep tokens would attend to the zeros that shallow '
            'tokens leave; use "kv_only"'
        )
