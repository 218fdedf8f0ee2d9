"""Checks that the engines of a benchmark compute what they are timed for, against one plain forward pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness.rounds import Refused
from vllm_buddy.artifact import Artifact
from vllm_buddy.method import (
    LayerPath,
    PathSchedule,
    Route,
    Router,
    TokenRouter,
    TokenSchedule,
    depth_for_budget,
)
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.serving.admission.option_names import BUDGET_KEY, FULL_PROMPT, PROMPT_KEY, ROUTED_PROMPT
from vllm_buddy.serving.schedule.route_maker import RouteMaker

NUM_LIKELIEST = 20  # compared tokens of a distribution; vLLM returns no more
NUM_CHECKED = 8  # compared prompts of a batch: the plain forward takes most of a second for each
# Bounds for the likeliest second tokens, as means over the prompts. Observed on each of 8 prompts with a bf16 engine at
# full depth, and at 0.9 and 0.75 with a random bypass of rank 64: at least 17 of 20 in common and at most 0.16 nats
# apart. At half the layers without repair, where no token is likely: 15 and 0.33 on one prompt. Two engines of which
# one ran one layer less: a median of 13 and 0.43 on 32 prompts.
MIN_COMMON = 15
MAX_DISTANCE = 0.3


@dataclass(kw_only=True)
class Routing:
    """Which layers the requests of a variant run.

    layers: number per token. path: the layers of the whole model that stock vLLM runs; None for buddy.
    budget, router, schedule: of buddy. bypass: whether rows that skip a layer go through its bypass.
    tokens: chooses the depths of single tokens; None: those of a request have the same. by_token: whether it does so
        in prompts, and in decoded tokens. full_prompt: whether prompts run all layers.
    """

    name: str
    layers: int
    path: LayerPath | None = None
    budget: float | None = None
    router: Router | None = None
    schedule: PathSchedule = field(default_factory=PathSchedule)
    bypass: bool = True
    tokens: TokenRouter | None = None
    by_token: tuple[bool, bool] = (False, False)
    kv_policy: str = MASKED
    full_prompt: bool = False

    def route(self, prompt: Sequence[int]) -> Route:
        """The route of one of its requests."""
        assert self.router is not None
        maker = RouteMaker(self.router, self.schedule, TokenSchedule(), self.tokens, self.by_token)
        assert self.budget is not None
        return maker.route(self.budget, prompt, len(prompt), None, full_prompt=self.full_prompt)

    @property
    def extra_args(self) -> dict[str, Any] | None:
        """Options that its requests pass to the plugin."""
        if self.budget is None:
            return None
        return {BUDGET_KEY: self.budget, PROMPT_KEY: FULL_PROMPT if self.full_prompt else ROUTED_PROMPT}


def served_routings(artifact: Artifact, budgets: Sequence[float], name: str = "buddy") -> list[Routing]:
    """What requests at these budgets run on a server with the artifact and the usual settings. name: of the server."""
    num_layers, router, schedule = artifact.config.base_model.num_layers, artifact.router(), artifact.schedule()
    return [
        Routing(name=f"{name} {b}", layers=depth_for_budget(b, num_layers), budget=b, router=router, schedule=schedule)
        for b in budgets
    ]


class Reference:
    """The method's plain routed forward, in float32 on the engines' weights.

    Stock vLLM is compared with the base model on the layers it runs. For buddy the forward has the artifact's LoRA and
    bypass too.
    """

    def __init__(
        self,
        model_dir: Path,
        artifact: Artifact,
        dtype: torch.dtype,
        change: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """change: is made to the model after it is loaded."""
        self._base = _load(model_dir, dtype).float()
        self._changed = self._base
        if artifact.lora is not None:
            changed = _load(model_dir, dtype)
            artifact.lora.merge_into(changed)
            self._changed = changed.float()
        if change is not None:
            for model in {self._base, self._changed}:
                change(model)
        like = torch.empty(0, dtype=dtype)
        self._bypass = None if artifact.bypass is None else artifact.bypass.to(like).to(like.float())
        self._known: dict[Any, dict[int, float]] = {}

    def check(self, variant: Routing, prompts: Sequence[list[int]], found: Sequence[Mapping[int, float]]) -> None:
        """Compare the distributions of a variant with the reference's.

        Sums in bf16 differ in the last bits, so two correct programs may generate different greedy tokens. A wrong
        layer, bypass or cache entry changes every distribution at once.

        found: for each prompt, the NUM_LIKELIEST tokens and their logprobs after the prompt and its last token again.

        Raises:
            Refused: the distributions differ.
        """
        shared: list[int] = []
        distances: list[float] = []
        for ours, prompt in zip(found[:NUM_CHECKED], prompts):
            expected = self._second_token_logprobs(variant, prompt)
            common = ours.keys() & expected.keys()
            shared.append(len(common))
            apart = [abs(ours[t] - expected[t]) for t in common]
            distances.append(float(np.mean(apart)) if apart else float("inf"))
        if not (np.mean(shared) >= MIN_COMMON and np.mean(distances) <= MAX_DISTANCE):
            raise Refused(
                f"{variant.name} does not compute what the reference computes: {np.mean(shared):.1f} of "
                f"{NUM_LIKELIEST} likeliest tokens in common, {np.mean(distances):.2f} nats apart; nothing is timed"
            )

    def _second_token_logprobs(self, variant: Routing, prompt: list[int]) -> dict[int, float]:
        token_ids = [*prompt, prompt[-1]]
        paths = _paths(variant, prompt, token_ids)
        routed = variant.path is None
        key = (tuple(token_ids), tuple(paths), routed, variant.bypass, variant.kv_policy)
        if key not in self._known:
            model = self._changed if routed else self._base
            bypass = self._bypass if routed and variant.bypass else None
            logprobs = routed_logits(model, token_ids, paths, variant.kv_policy, bypass)[-1].log_softmax(dim=-1)
            values, tokens = logprobs.topk(NUM_LIKELIEST)
            self._known[key] = dict(zip(tokens.tolist(), values.tolist()))
        return self._known[key]


def _paths(variant: Routing, prompt: list[int], token_ids: list[int]) -> list[LayerPath]:
    if variant.path is not None:
        return [variant.path] * len(token_ids)
    route = variant.route(prompt)
    return [run.path for run in route.runs(0, len(token_ids), token_ids) for _ in range(run.num_tokens)]


def _load(model_dir: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True).eval()
