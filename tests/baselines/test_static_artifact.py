"""Tests of static pruning as an artifact, whose prior and library give the same layers."""

from pathlib import Path

import pytest

from tests.harness.tiny_models import NUM_LAYERS, save_tiny_model
from vllm_buddy.artifact import load_artifact
from vllm_buddy.artifact.fingerprint import BaseModelIdentity, identify
from vllm_buddy.baselines import static_artifact, static_path
from vllm_buddy.method import full_path

ORDER = [3, 6, 1, 2, 5, 4]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModelIdentity:
    return identify(save_tiny_model(tmp_path_factory.mktemp("static"), "llama"))


@pytest.mark.parametrize("library", [None, True, False])
def test_router_follows_the_order_at_every_depth(base: BaseModelIdentity, tmp_path: Path, library: bool | None) -> None:
    """Fails if a server without `paths: library`, the default here, runs other layers than the order says."""
    static_artifact("x", base, ORDER).save(tmp_path)
    loaded = load_artifact(tmp_path)
    router = loaded.router(library=library)
    for depth in range(3, NUM_LAYERS):
        assert router.path(None, depth) == static_path(ORDER, depth)
    assert router.path(None, NUM_LAYERS) == full_path(NUM_LAYERS)
    assert loaded.decision is None
    assert loaded.repair == "none"
    assert loaded.schedule().interval == 0


def test_names_say_where_the_order_comes_from(base: BaseModelIdentity) -> None:
    """Fails if two methods with the same layers have the same digest, or the artifact does not record its method."""
    digests = {static_artifact(name, base, ORDER).digest for name in ("sleb", "taylor")}
    assert len(digests) == 2
    assert static_artifact("sleb", base, ORDER).config.prior.indicator == "sleb"
