"""LoRA adapters on routed requests: tokens equal those of the reference with the adapter merged into its weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm.lora.layers import LoRAMapping

from tests.harness.engine import Ask, Engine, Tiny, start_engine
from tests.harness.tiny_models import load_model, random_prompts
from vllm_buddy.method import PathSchedule
from vllm_buddy.method.lora import LoraDeltas
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.serving.forward.adapters import RoutedAdapters

RANK, ALPHA = 8, 16.0
NUM_TOKENS = 16
BUDGETS = (1.0, 0.5, 0.75, 0.4, 1.0, 0.625)
NAMES = (None, "one", "other")  # without an adapter, and as many adapters as the server has slots


def write_adapter(folder: Path, model: Any, seed: int) -> LoraDeltas:
    """Write a random adapter of all linear layers and the head in PEFT's format."""
    generator = torch.Generator().manual_seed(seed)
    a, b = {}, {}
    for name, module in model.named_modules():
        if name.endswith("_proj") or name == "lm_head":
            a[name] = torch.randn(RANK, module.in_features, generator=generator) * 0.2
            b[name] = torch.randn(module.out_features, RANK, generator=generator) * 0.05
    parts = {f"base_model.model.{n}.lora_{x}.weight": t for x, d in (("A", a), ("B", b)) for n, t in d.items()}
    folder.mkdir()
    save_file(parts, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in a})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return LoraDeltas(a, b, ALPHA)


@pytest.fixture(scope="module")
def adapted(
    tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory
) -> dict[str | None, tuple[Any, Tiny]]:
    """By the adapter's name: vLLM's LoRARequest, and the model with the adapter merged."""
    from vllm.lora.request import LoRARequest

    base, root = tiny("llama"), tmp_path_factory.mktemp("adapters")
    found: dict[str | None, tuple[Any, Tiny]] = {None: (None, base)}
    for number, name in enumerate(NAMES[1:], start=1):
        assert name is not None
        model = load_model(base.folder)
        write_adapter(root / name, model, seed=number).merge_into(model)
        request = LoRARequest(name, number, str(root / name))
        found[name] = request, Tiny(base.folder, base.artifact_folder, model, base.artifact)
    return found


@pytest.fixture(scope="module")
def engine(adapted: dict[str | None, tuple[Any, Tiny]]) -> Engine:
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    engine = start_engine(adapted[None][1], buddy={"kv_policy": "masked"}, **options)
    engine.configure("masked", 4)
    return engine


def asks(adapted: dict[str | None, tuple[Any, Tiny]], seed: int) -> list[Ask]:
    """All adapters at each budget, prompts of different lengths."""
    pairs = [(budget, name) for budget in BUDGETS for name in NAMES]
    prompts = random_prompts(len(pairs), seed=seed, min_tokens=1, max_tokens=90)
    return [
        Ask(tuple(prompt), budget, NUM_TOKENS, adapter=adapted[name][0])
        for prompt, (budget, name) in zip(prompts, pairs)
    ]


def check(adapted: dict[str | None, tuple[Any, Tiny]], batch: list[Ask], outputs: list[Any]) -> None:
    for ask, output in zip(batch, outputs, strict=True):
        name = None if ask.adapter is None else ask.adapter.lora_name
        expected = adapted[name][1].expected(ask, "masked", PathSchedule(4))
        assert list(output.outputs[0].token_ids) == expected.token_ids, (name, ask.budget)
        depths = [path.bit_count() for path in expected.paths]
        assert output.kv_transfer_params["buddy"]["layers_executed_max"] == max(depths)


def test_a_mixed_batch_equals_the_merged_reference(engine: Engine, adapted: dict[str | None, tuple[Any, Tiny]]) -> None:
    """Fails if a layer that runs a part of the rows applies the adapters of other rows, or one to rows without any."""
    engine.configure("masked", 4)
    batch = asks(adapted, seed=0)
    check(adapted, batch, engine.run(batch))


def test_chunks_preemption_and_cached_prefixes(engine: Engine, adapted: dict[str | None, tuple[Any, Tiny]]) -> None:
    """Fails if a prefix is found by requests with another adapter, or adapters are mixed up when tokens run again."""
    engine.configure("masked", 4, chunk=50)
    batch = asks(adapted, seed=1)
    shared = tuple(random_prompts(1, seed=2, min_tokens=70, max_tokens=70)[0])
    batch += [Ask(shared, budget, NUM_TOKENS, adapter=adapted[name][0]) for budget in (1.0, 0.5) for name in NAMES]
    for _ in range(2):  # the second time with what the first left in the prefix cache
        outputs = engine.run(batch, before_step=lambda step: step % 7 == 6 and engine.preempt(step))
        check(adapted, batch, outputs)
    assert any(output.num_cached_tokens for output in outputs)


def test_the_test_adapters_matter(adapted: dict[str | None, tuple[Any, Tiny]]) -> None:
    """Fails if adapters no longer change the tokens, so that the others prove nothing."""
    prompt = tuple(random_prompts(1, seed=3, min_tokens=20, max_tokens=20)[0])
    for budget in (1.0, 0.5):
        ask = Ask(prompt, budget, NUM_TOKENS)
        tokens = [adapted[name][1].expected(ask, "masked", PathSchedule(4)).token_ids for name in NAMES]
        assert tokens[0] != tokens[1] != tokens[2] != tokens[0]


def test_logprobs_of_prompts(engine: Engine, adapted: dict[str | None, tuple[Any, Tiny]]) -> None:
    """Fails if the head takes another request's adapter for a prompt's logprobs, whole or in chunks."""
    engine.configure("masked", 4, chunk=50)
    sampling = {"prompt_logprobs": 0}
    batch = [Ask(ask.prompt, ask.budget, 1, sampling, adapter=ask.adapter) for ask in asks(adapted, seed=4)]
    for ask, output in zip(batch, engine.run(batch), strict=True):
        name = None if ask.adapter is None else ask.adapter.lora_name
        tiny = adapted[name][1]
        paths = tiny.expected(ask, "masked", PathSchedule(4)).paths[: len(ask.prompt)]
        logits = routed_logits(tiny.model, ask.prompt, paths, "masked", tiny.artifact.bypass)
        expected = logits.log_softmax(dim=-1)[torch.arange(len(paths) - 1), list(ask.prompt[1:])]
        found = [position[token].logprob for position, token in zip(output.prompt_logprobs[1:], ask.prompt[1:])]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_full_depth_equals_stock_vllm(engine: Engine, adapted: dict[str | None, tuple[Any, Tiny]]) -> None:
    """Fails if full depth with an adapter differs from stock vLLM, or stock now leaves rows without adapters alone.

    The second is why RoutedAdapters leaves rows out; when it fails, that part can go.
    """
    options: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": RANK}
    stock = start_engine(adapted[None][1], model_impl="auto", **options)
    engine.configure("masked", 4)
    sampling = {"logprobs": 0}
    prompts = random_prompts(6, seed=5, min_tokens=1, max_tokens=90)
    full = [
        Ask(tuple(p), 1.0, NUM_TOKENS, sampling, adapter=adapted[NAMES[1 + i % 2]][0]) for i, p in enumerate(prompts)
    ]
    plain = [Ask(ask.prompt, None, NUM_TOKENS, sampling, adapter=ask.adapter) for ask in full]
    for ours, theirs in zip(engine.run(full), stock.run(plain), strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.outputs[0].cumulative_logprob == pytest.approx(theirs.outputs[0].cumulative_logprob, abs=1e-4)
    alone = Ask(tuple(prompts[0]), None, NUM_TOKENS)
    expected = adapted[None][1].expected(alone, "masked", PathSchedule(4)).token_ids
    beside = stock.run([alone, *plain])[0]
    assert list(beside.outputs[0].token_ids) != expected


@pytest.mark.parametrize("is_prefill", [True, False])
def test_rows_without_an_adapter_get_none_anywhere(is_prefill: bool) -> None:
    """Fails if a request without an adapter gets another user's at the embedding, in a layer or at the logits."""
    adapters = RoutedAdapters(64, 8, "cpu")
    adapters.update_metadata(LoRAMapping((0, 1), (0, 1), is_prefill=is_prefill), [1], 1, 10)
    hidden, logits = torch.ones(2, 4), torch.zeros(2, 10)
    adapters.add_lora_logits(logits, hidden, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 10, 2), 1.0)
    embedded, projected = torch.zeros(2, 4), torch.zeros(2, 4)
    adapters.add_lora_embedding(embedded, torch.ones(2, 2), torch.ones(1, 1, 4, 2), add_inputs=True)
    adapters.add_lora_linear(projected, hidden, (torch.ones(1, 1, 2, 4),), (torch.ones(1, 1, 4, 2),), 1.0, (4,))
    prompts = torch.zeros(2, 3, 10)
    for adapters.buddy_prompt, rows in enumerate(prompts):  # logprobs of a prompt
        adapters.add_lora_logits(rows, torch.ones(3, 4), torch.ones(1, 1, 2, 4), torch.ones(1, 1, 10, 2), 1.0)
    assert prompts.tolist() == [[[0.0] * 10] * 3, [[8.0] * 10] * 3]
    for rows, delta in ((logits, 8.0), (embedded, 2.0), (projected, 8.0)):
        assert rows[0].tolist() == [0.0] * rows.shape[1]
        assert rows[1].tolist() == [delta] * rows.shape[1]
