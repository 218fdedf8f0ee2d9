"""Tests the check of distributions: right outputs pass, a wrong layer or a missing repair does not."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.harness.reference_check import MAX_DISTANCE, MIN_COMMON, NUM_LIKELIEST, Reference, Routing
from benchmarks.harness.rounds import Refused
from tests.harness.tiny_models import NUM_LAYERS, load_model, random_artifact, random_prompts, save_tiny_model
from vllm_buddy.artifact import Artifact
from vllm_buddy.baselines import save_pruned_checkpoint
from vllm_buddy.method import LayerPath, full_path, layers_of
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.method.reference import routed_logits

DEPTH = 6
PROMPTS = random_prompts(4, min_tokens=12)
FULL = full_path(NUM_LAYERS)


class Setting:
    """A model, an artifact with one path per depth, bypass and LoRA, and the reference on both."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = save_tiny_model(root / "model", "llama")
        parts = {"decision": False, "paths_per_depth": 0, "bypass_rank": 4, "lora_rank": 2}
        self.artifact: Artifact = random_artifact(root / "artifact", self.folder, **parts)
        self.router = self.artifact.router()
        self.path: LayerPath = self.router.path(None, DEPTH)
        self.reference = Reference(self.folder, self.artifact, torch.float32)

    def stock(self, path: LayerPath) -> Routing:
        return Routing(name="stock", layers=path.bit_count(), path=path)

    def buddy(self, *, bypass: bool = True) -> Routing:
        return Routing(name="buddy", layers=DEPTH, budget=DEPTH / NUM_LAYERS, router=self.router, bypass=bypass)

    def stock_logprobs(self, path: LayerPath) -> list[dict[int, float]]:
        """Distributions of transformers' own forward, on a checkpoint that has only these layers."""
        folder = self.folder
        if path != FULL:
            folder = save_pruned_checkpoint(self.folder, layers_of(path), self.root / f"pruned-{path:x}")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return [likeliest(last_logits(model, [*prompt, prompt[-1]])) for prompt in PROMPTS]

    def buddy_logprobs(
        self, *, path: LayerPath | None = None, bypass: bool = True, lora: bool = True
    ) -> list[dict[int, float]]:
        """Distributions of the routed forward with the artifact, or with an artifact that lacks a part."""
        model = load_model(self.folder)
        if lora:
            self.artifact.lora.merge_into(model)
        found = []
        for prompt in PROMPTS:
            paths = [path or self.path] * (len(prompt) + 1)
            repair = self.artifact.bypass if bypass else None
            found.append(likeliest(routed_logits(model, [*prompt, prompt[-1]], paths, MASKED, repair)[-1]))
        return found


def shortened(path: LayerPath) -> LayerPath:
    """The path without its second layer."""
    return path & ~(1 << layers_of(path)[1])


@torch.no_grad()
def last_logits(model: nn.Module, token_ids: Sequence[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0, -1]


def likeliest(logits: torch.Tensor) -> dict[int, float]:
    values, tokens = logits.log_softmax(dim=-1).topk(NUM_LIKELIEST)
    return dict(zip(tokens.tolist(), values.tolist()))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("reference"))


def test_stock_is_compared_with_the_base_model_on_its_layers(setting: Setting) -> None:
    """Fails if a correct engine is refused: the whole model, or a pruned checkpoint, which has no LoRA."""
    for path in (FULL, setting.path):
        setting.reference.check(setting.stock(path), PROMPTS, setting.stock_logprobs(path))


def test_buddy_is_compared_with_its_bypass_and_lora(setting: Setting) -> None:
    """Fails if a correct routed engine is refused, with its bypasses or with them switched off."""
    for bypass in (True, False):
        setting.reference.check(setting.buddy(bypass=bypass), PROMPTS, setting.buddy_logprobs(bypass=bypass))


def test_a_layer_less_is_refused(setting: Setting) -> None:
    """Fails if an engine that leaves out a layer, and is faster for it, is timed as if it ran its whole path."""
    for path in (FULL, setting.path):
        with pytest.raises(Refused, match="stock does not compute what the reference computes"):
            setting.reference.check(setting.stock(path), PROMPTS, setting.stock_logprobs(shortened(path)))
    found = setting.buddy_logprobs(path=shortened(setting.path))
    with pytest.raises(Refused, match=r"buddy does not compute what the reference computes.*nothing is timed"):
        setting.reference.check(setting.buddy(), PROMPTS, found)


@pytest.mark.parametrize("missing", ["bypass", "lora"])
def test_a_part_of_the_artifact_that_is_left_out_is_refused(setting: Setting, missing: str) -> None:
    """Fails if buddy may be timed without the bypass of its rows, or without the artifact's change of the weights."""
    with pytest.raises(Refused):
        setting.reference.check(setting.buddy(), PROMPTS, setting.buddy_logprobs(**{missing: False}))


def test_a_bypass_that_should_not_run_is_refused(setting: Setting) -> None:
    """Fails if the variant *no bypass* may be timed with the bypass."""
    with pytest.raises(Refused):
        setting.reference.check(setting.buddy(bypass=False), PROMPTS, setting.buddy_logprobs())


def test_other_tokens_and_far_logprobs_are_refused(setting: Setting) -> None:
    """Fails if one of the two tolerances is not applied, or answers with nothing in common count as 0 nats apart."""
    right = setting.stock_logprobs(FULL)
    far = [{token: value - 1.1 * MAX_DISTANCE for token, value in one.items()} for one in right]
    few = [dict(list(one.items())[: MIN_COMMON - 1]) for one in right]
    for wrong in (far, few, [{-1: 0.0}] * len(PROMPTS), [{}] * len(PROMPTS)):
        with pytest.raises(Refused):
            setting.reference.check(setting.stock(FULL), PROMPTS, wrong)
    near = [{token: value - 0.9 * MAX_DISTANCE for token, value in one.items()} for one in right]
    setting.reference.check(setting.stock(FULL), PROMPTS, near)
