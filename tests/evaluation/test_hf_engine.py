"""The engine over Hugging Face models, compared with the reference sample by sample."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.evaluation.conftest import Tiny
from tests.harness.tiny_models import NUM_LAYERS, load_model, random_artifact
from vllm_buddy.evaluation import HfEngine, Policy, Sample, Scores, Task, Variant
from vllm_buddy.evaluation.figures import text_figures
from vllm_buddy.evaluation.policy import dense_policy
from vllm_buddy.method import PathSchedule
from vllm_buddy.method.kv_policy import KV_POLICIES

DEPTH = 5
# float32, with sums in another order: batched attention and a loop, logits in chunks and at once.
TOLERANCE = 2e-4


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total


def _score(
    tiny: Tiny, samples: Sequence[Sample], *, interval: int = 4, kv_policy: str = "masked", depth: int = DEPTH
) -> tuple[Scores, Scores]:
    """Return the scores of the unrouted model and of the artifact."""
    variants = [
        Variant(dense_policy(tiny.artifact.config.base_model), 1.0, NUM_LAYERS),
        Variant(Policy("buddy", tiny.artifact, PathSchedule(interval)), depth / NUM_LAYERS, depth),
    ]
    ((dense, buddy),) = HfEngine(tiny.model, kv_policy).score([Task("text", samples, True)], variants, _silent)
    return dense, buddy


@pytest.mark.parametrize("interval", [0, 1, 4])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_scores_are_the_references(tiny: Tiny, samples: list[Sample], kv_policy: str, interval: int) -> None:
    """Fails if padding, batching or re-routing changes a score, or KL has other positions or the other direction."""
    dense, buddy = _score(tiny, samples, interval=interval, kv_policy=kv_policy)
    assert buddy.kl is not None
    for index, sample in enumerate(samples):
        log_q = tiny.by_hand(sample, DEPTH, interval, kv_policy)
        log_p = tiny.by_hand(sample, NUM_LAYERS, interval, kv_policy)
        rows = torch.arange(len(sample.targets)), torch.tensor(list(sample.targets))
        assert np.allclose(buddy.logprobs[index], log_q[rows], atol=TOLERANCE)
        assert np.allclose(dense.logprobs[index], log_p[rows], atol=TOLERANCE)
        assert (buddy.greedy[index] == log_q.argmax(dim=1).numpy()).all()
        assert np.allclose(buddy.kl[index], (log_p.exp() * (log_p - log_q)).sum(dim=1), atol=10 * TOLERANCE)


def test_perplexity_by_hand(tiny: Tiny) -> None:
    """Fails if the context is scored, exponentials are averaged over windows, or the logarithm has another base."""
    rng = np.random.default_rng(1)
    windows = [Sample(rng.integers(0, 512, 32).tolist(), 8) for _ in range(3)]
    dense, buddy = _score(tiny, windows)
    losses = []
    for window in windows:
        log_q = tiny.by_hand(window, DEPTH, 4, "masked")
        losses.append([-float(log_q[i, token]) for i, token in enumerate(window.token_ids[8:])])
    variant = Variant(Policy("buddy", tiny.artifact, PathSchedule(4)), 0.625, DEPTH)
    figure = text_figures(variant, buddy, dense)[0]
    assert (figure.metric, figure.n, figure.layers, figure.budget) == ("perplexity", 3 * 24, DEPTH, 0.625)
    assert math.isclose(figure.value, math.exp(np.mean(losses)), rel_tol=TOLERANCE)
    stderr = figure.value * np.std(np.mean(losses, axis=1), ddof=1) / math.sqrt(3)
    assert math.isclose(figure.stderr, stderr, rel_tol=100 * TOLERANCE)


@pytest.mark.parametrize("interval", [0, 1, 4])
def test_no_score_depends_on_a_later_token(tiny: Tiny, interval: int) -> None:
    """Fails if a path depends on the tokens that are scored on it, which would make perplexity too good."""
    rng = np.random.default_rng(2)
    token_ids = rng.integers(0, 512, 48).tolist()
    _, before = _score(tiny, [Sample(token_ids, 16)], interval=interval)
    for changed in (16, 17, 25, 47):
        others = list(token_ids)
        others[changed] = (others[changed] + 1) % 512
        _, after = _score(tiny, [Sample(others, 16)], interval=interval)
        known = changed - 16
        assert (after.logprobs[0][:known] == before.logprobs[0][:known]).all()
        assert (after.greedy[0][: known + 1] == before.greedy[0][: known + 1]).all()
        assert after.logprobs[0][known] != before.logprobs[0][known]


def test_the_context_decides_the_path(tiny: Tiny) -> None:
    """Fails if the test above passes only because no path ever changes."""
    rng = np.random.default_rng(3)
    policy = Policy("buddy", tiny.artifact, PathSchedule(4))
    token_ids = rng.integers(0, 512, (8, 48)).tolist()
    first = {policy.route(Sample(ids, 16), DEPTH)[0].path for ids in token_ids}
    assert len(first) > 1
    assert any(len(policy.route(Sample(ids, 16), DEPTH)) > 1 for ids in token_ids)


def test_merged_weights_are_used_and_the_base_is_left_alone(
    tiny: Tiny, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Fails if an artifact's change of weights is not applied, or is applied to the other policies too."""
    artifact = random_artifact(tmp_path_factory.mktemp("lora") / "a", tiny.folder, lora_rank=2)
    assert artifact.lora is not None
    merged = load_model(tiny.folder)
    artifact.lora.merge_into(merged)
    policy = Policy("paper", artifact, PathSchedule(4))
    base = artifact.config.base_model
    variants = [
        Variant(policy, 1.0, NUM_LAYERS),
        Variant(policy, 0.625, DEPTH),
        Variant(dense_policy(base), 1.0, NUM_LAYERS),
    ]
    ((full, routed, dense),) = HfEngine(tiny.model, "masked").score([Task("t", samples, False)], variants, _silent)
    hand = Tiny(tiny.folder, merged, artifact)
    for index, sample in enumerate(samples):
        rows = torch.arange(len(sample.targets)), torch.tensor(list(sample.targets))
        assert np.allclose(routed.logprobs[index], hand.by_hand(sample, DEPTH, 4, "masked")[rows], atol=TOLERANCE)
        assert np.allclose(full.logprobs[index], hand.by_hand(sample, NUM_LAYERS, 4, "masked")[rows], atol=TOLERANCE)
        assert np.allclose(dense.logprobs[index], tiny.by_hand(sample, NUM_LAYERS, 4, "masked")[rows], atol=TOLERANCE)
    assert full.logprobs[0][0] != dense.logprobs[0][0]
    assert routed.kl is None


def test_the_unrouted_model_agrees_with_itself(tiny: Tiny, samples: list[Sample]) -> None:
    """Fails if KL and agreement compare different positions."""
    dense, buddy = _score(tiny, samples, depth=NUM_LAYERS)
    assert dense.kl is not None
    assert all((kl == 0).all() for kl in dense.kl)
    for index in range(len(samples)):
        assert (buddy.logprobs[index] == dense.logprobs[index]).all()
