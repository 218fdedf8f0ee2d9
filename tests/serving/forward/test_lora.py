"""An artifact that changes base weights: merged while vLLM loads them, at every budget."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.harness.batches import batch
from tests.harness.engine import Ask, Engine, Tiny, make_tiny, start_engine
from tests.harness.server_config import configure, refusal
from tests.harness.tiny_models import load_model, random_prompts
from vllm_buddy.method import PathSchedule, RequestRoute
from vllm_buddy.method.kv_policy import KV_POLICIES
from vllm_buddy.method.reference import generate


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A model whose reference is merged, and its artifact. Qwen2 stacks biases with the weights, which stay."""
    return make_tiny(tmp_path_factory.mktemp("lora"), "qwen2", lora_rank=2)


@pytest.fixture(scope="module")
def engine(merged: Tiny) -> Engine:
    return start_engine(merged)


@pytest.mark.parametrize("policy", KV_POLICIES)
def test_tokens_equal_the_merged_reference(engine: Engine, policy: str) -> None:
    """Fails if a change is scaled otherwise than in training, lands in another part of vLLM's stacked weights, or is
    not in what `kv_only` keeps of them."""
    engine.configure(policy, 4)
    asks = batch(seed=9)
    engine.check(asks, engine.run(asks))


def test_the_whole_model_is_changed_too(engine: Engine, merged: Tiny) -> None:
    """Fails if the test above passes because the changes do nothing, or only where layers are skipped."""
    engine.configure("masked", 4)
    ask = Ask(tuple(random_prompts(1, seed=3)[0]), 1.0, 16)
    (output,) = engine.run([ask])
    engine.check([ask], [output])
    base, router = load_model(merged.folder), merged.artifact.router()
    unchanged = generate(
        base, RequestRoute(router, PathSchedule(4), router.num_layers, ask.prompt), ask.prompt, 16, "masked"
    )
    assert list(output.outputs[0].token_ids) != unchanged.token_ids


def test_mistrals_own_files_are_refused_with_the_way_out(merged: Tiny, tmp_path: Path) -> None:
    """Fails if weights under other names are taken for weights that are missing."""
    shutil.copytree(merged.folder, tmp_path / "model")
    save_file({"norm.weight": torch.ones(1)}, tmp_path / "model" / "consolidated.safetensors")
    assert "--load-format safetensors" in refusal(merged, model=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantization": "fp8", "dtype": "bfloat16"}, "quantised (fp8)"),
        ({"load_format": "dummy"}, "--load-format dummy"),
        ({"load_format": "sharded_state"}, "--load-format sharded_state"),
    ],
    ids=str,
)
def test_weights_that_cannot_be_changed_are_refused_at_start(
    merged: Tiny, tiny: Callable[[str], Tiny], options: dict[str, str], told: str
) -> None:
    """Fails if the base model is served under an artifact that was trained with changes, or a bypass is refused too."""
    message = refusal(merged, **options)
    assert told in message
    assert "changes the base weights" in message
    configure(tiny("llama"), **options)
