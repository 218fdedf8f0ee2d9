"""Names of policies, and the paths that policies choose."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.evaluation.conftest import Tiny, random_samples
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS, random_artifact
from vllm_buddy.artifact import load_artifact
from vllm_buddy.baselines import static_path
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation import Policy, PolicySpec
from vllm_buddy.evaluation.policy import static_policy
from vllm_buddy.method import PathSchedule

DEPTH = 5
MANY = [(40, 12)] * 20


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dense", ("dense", "dense", None, None, False)),
        ("buddy", ("buddy", "buddy", None, None, False)),
        ("buddy:frozen", ("buddy:frozen", "buddy", "frozen", None, False)),
        ("sleb", ("sleb", "sleb", None, None, True)),
        ("mine=a/b", ("mine", "mine", None, Path("a/b"), False)),
        ("mine:prompt_only=a=b", ("mine:prompt_only", "mine", "prompt_only", Path("a=b"), False)),
    ],
)
def test_names(text: str, parts: tuple[object, ...]) -> None:
    """Fails if a name is read as another policy."""
    spec = PolicySpec.parse(text)
    assert (spec.name, spec.base_name, spec.variant, spec.folder, spec.is_static) == parts
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("budy", "unknown policy 'budy'; known are dense, buddy, shortgpt, sleb, .*, and NAME=DIR"),
        ("", "unknown policy ''"),
        ("buddy:frosen", "unknown variant 'frosen'; known are frozen, prompt_only, token, shuffled, full_prompt"),
        ("sleb:frozen", "'sleb' has no router, so no variant 'frozen'"),
        ("dense:frozen", "'dense' has no router"),
        ("sleb=a", "needs a folder and a name that is not one of dense, buddy"),
        ("mine=", "needs a folder"),
        ("=a", "needs a folder"),
    ],
)
def test_names_that_do_not_exist(text: str, message: str) -> None:
    """Fails if a misspelt policy is accepted or left out without a message."""
    with pytest.raises(EvaluationError, match=message):
        PolicySpec.parse(text)


def test_static_policy_follows_the_order(tiny: Tiny, tmp_path: Path) -> None:
    """Fails if a static policy is repaired, re-routed, or changed when an engine loads it from disk."""
    order = [3, 6, 1, 2, 5, 4]
    policy = static_policy("sleb", tiny.artifact.config.base_model, order)
    policy.artifact.save(tmp_path / "a")
    loaded = Policy("sleb", load_artifact(tmp_path / "a"), policy.schedule, policy.library)
    assert loaded.artifact.bypass is None
    assert loaded.artifact.lora is None
    for depth in range(3, NUM_LAYERS + 1):
        for sample in random_samples([(20, 3), (30, 29)]):
            for p in (policy, loaded):
                assert [run.path for run in p.route(sample, depth)] == [static_path(order, depth)]


def test_frozen_takes_the_most_common_path(tiny: Tiny, tmp_path: Path) -> None:
    """Fails if `frozen` does not take the path that most tokens run."""
    samples = random_samples(MANY)
    policy = Policy("buddy", tiny.artifact, PathSchedule(4))
    counts: Counter[int] = Counter()
    for sample in samples:
        counts.update(run.path for run in policy.route(sample, DEPTH) for _ in range(run.num_tokens))
    assert policy.path_counts(samples, DEPTH) == counts
    assert counts.total() == 20 * 39
    assert len(counts) > 1
    frozen = policy.frozen(samples, [DEPTH, NUM_LAYERS])
    assert set(frozen.path_counts(samples, DEPTH)) == {max(counts, key=lambda path: counts[path])}
    assert frozen.artifact.bypass is tiny.artifact.bypass
    frozen.artifact.save(tmp_path / "a")
    loaded = load_artifact(tmp_path / "a")
    assert loaded.decision is None
    assert loaded.bypass is not None
    assert loaded.config.library is not None
    assert list(loaded.config.library) == [DEPTH]


def test_frozen_paths_leave_out_what_chooses_among_others(tiny: Tiny, tmp_path: Path) -> None:
    """Fails if the artifact with few depths cannot be saved, and so not be evaluated in vLLM, because it has a Budget
    Predictor of more; or if `frozen` at full depth alone has no path."""
    artifact = random_artifact(tmp_path / "with", tiny.folder, predictor_depths=PREDICTOR_DEPTHS)
    assert artifact.predictor is not None
    policy = Policy("buddy", artifact, PathSchedule(0))
    frozen = policy.frozen(random_samples(MANY[:2]), [DEPTH, NUM_LAYERS])
    frozen.artifact.save(tmp_path / "a")
    assert load_artifact(tmp_path / "a").predictor is None
    full = policy.frozen(random_samples(MANY[:2]), [NUM_LAYERS])
    assert [len(full.route(sample, NUM_LAYERS)) for sample in random_samples(MANY[:2])] == [1, 1]


def test_prompt_only_never_changes_its_path(tiny: Tiny) -> None:
    """Fails if `prompt_only` re-routes, or decides another first path."""
    policy = Policy("buddy:prompt_only", tiny.artifact, PathSchedule(0))
    routed = Policy("buddy", tiny.artifact, PathSchedule(4))
    samples = random_samples(MANY)
    assert all(len(policy.route(sample, DEPTH)) == 1 for sample in samples)
    assert any(len(routed.route(sample, DEPTH)) > 1 for sample in samples)
    assert all(policy.route(s, DEPTH)[0].path == routed.route(s, DEPTH)[0].path for s in samples)


def test_full_prompt_runs_all_layers_in_the_context_alone(tiny: Tiny) -> None:
    """Fails if the context is routed, or the scored tokens run another path than those of the whole request."""
    schedule = PathSchedule(4)
    policy = Policy("buddy:full_prompt", tiny.artifact, schedule, full_prompt=True)
    routed = Policy("buddy", tiny.artifact, schedule)
    for sample in random_samples(MANY):
        first, *rest = policy.route(sample, DEPTH)
        assert first == (sample.num_context, policy.router.full)
        plain = [run.path for run in routed.route(sample, DEPTH) for _ in range(run.num_tokens)]
        assert [run.path for run in rest for _ in range(run.num_tokens)] == plain[sample.num_context :]


def test_a_sample_leaves_something_to_score() -> None:
    """Fails if a sample without tokens to score is accepted."""
    from vllm_buddy.evaluation import Sample

    for context in (0, 3, 4):
        with pytest.raises(ValueError, match="leave nothing to score"):
            Sample(np.arange(3).tolist(), context)
