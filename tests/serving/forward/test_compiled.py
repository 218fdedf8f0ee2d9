"""Layers compiled one by one: the same tokens, and nothing compiled again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.quantised import FORMATS, quantise
from tests.harness.batches import batch
from tests.harness.engine import Engine, Tiny, start_engine
from tests.harness.tiny_models import HIDDEN_SIZE, NUM_LAYERS, random_exits
from vllm_buddy.method import depth_for_budget
from vllm_buddy.method.path import gap_starts
from vllm_buddy.serving.schedule.draft_pace import DraftPass

# fp32 sums of 128 products of magnitude 1 in another order
ATOL = 1e-5


@pytest.fixture(scope="module")
def compiled(tiny: Callable[[str], Tiny]) -> Engine:
    """A routed Llama engine with vLLM's default compilation mode."""
    return start_engine(tiny("llama"), enforce_eager=False)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_layers_of_other_families_share_their_code_too(tiny: Callable[[str], Tiny], family: str) -> None:
    """Fails if what only some families have is bound to another layer's, or keeps layers from sharing their code.

    Qwen2 has a bias of K, Qwen3 a norm per head, and layers of Mistral know their number.
    """
    engine = start_engine(tiny(family), enforce_eager=False)
    for policy in ("masked", "kv_only"):
        engine.configure(policy, 4)
        asks = batch(seed=8)
        engine.check(asks, engine.run(asks))
    check_skipped_rows(engine)
    _, *others = engine.runner.model.model.functions
    assert len({function._code for function in others}) == 1


# Layers in FP8 do not: compiled and not, they round too far apart for the check that binds them.
SHARED = [kind for kind in FORMATS if "FP8" not in kind]


@pytest.mark.parametrize("kind", [None, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SHARED)])
def test_layers_in_bf16_share_their_code_too(tiny: Callable[[str], Tiny], tmp_path: Path, kind: str | None) -> None:
    """Fails if rounding hides that layers are alike, or vLLM packs such weights in a form that is not found."""
    made = tiny("llama")
    if kind is not None:
        made = replace(made, folder=quantise(made.folder, tmp_path / "model", kind))
    engine = start_engine(made, enforce_eager=False, dtype="bfloat16")
    _, *others = engine.runner.model.model.functions
    assert len({function._code for function in others}) == 1


@pytest.mark.parametrize("eager", [True, False], ids=("eager", "compiled"))
def test_fp16_is_served_where_the_cpu_has_no_product_for_it(tiny: Callable[[str], Tiny], eager: bool) -> None:
    """Fails if the start ends with an error of oneDNN, although vLLM's own layers do without it."""
    engine = start_engine(tiny("llama"), enforce_eager=eager, dtype="float16")
    for policy in ("masked", "kv_only"):
        engine.configure(policy, 4, bypass=True)
        asks = batch(seed=9)
        for ask, output in zip(asks, engine.run(asks), strict=True):
            assert len(output.outputs[0].token_ids) == ask.max_tokens
            assert output.outputs[0].token_ids[0] == engine.expected(ask).token_ids[0]
            depth = depth_for_budget(ask.budget, NUM_LAYERS)
            assert output.kv_transfer_params["buddy"]["layers_executed_max"] == depth


def test_without_a_product_of_onednn_the_bypass_is_the_same(compiled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a weight that oneDNN refuses is no weight, or another one."""
    from vllm_buddy.serving.forward import bypasses

    def refuse(*_: object) -> None:
        raise RuntimeError("could not create a primitive descriptor for the matmul primitive")

    monkeypatch.setattr(bypasses.ops, "create_onednn_mm", refuse)
    matrix, rows = torch.randn(7, HIDDEN_SIZE), torch.randn(3, HIDDEN_SIZE)
    weight = bypasses._weight(matrix)
    torch.testing.assert_close(weight.product(rows, weight.tensor), rows @ matrix.t(), atol=ATOL, rtol=0)


@pytest.mark.parametrize("bypass", [False, True], ids=("bare", "bypass"))
@pytest.mark.parametrize("policy", ["masked", "kv_only"])
def test_compiled_layers_give_the_reference_tokens(compiled: Engine, policy: str, bypass: bool) -> None:
    """Fails if a compiled layer or bypass has another layer's weights, a length it was traced with, or other rows."""
    compiled.configure(policy, 4, bypass=bypass)
    asks = batch(seed=7)
    compiled.check(asks, compiled.run(asks))
    compiled.check(asks[:1], compiled.run(asks[:1]))  # one row, the size compilers like to specialise on


def test_compiled_bypasses_are_called_directly_and_are_the_formula(compiled: Engine) -> None:
    """Fails if the bypasses run uncompiled, unpacked or through torch's wrappers, or a layer gets another one's."""
    from vllm_buddy.serving.forward.bypasses import bypass_functions
    from vllm_buddy.serving.forward.direct_call import DirectCall

    bypass = compiled.tiny.artifact.bypass
    functions = bypass_functions(bypass, compiled.core.vllm_config)
    hidden, residual = torch.randn(2, 5, HIDDEN_SIZE)
    for layer in range(1, NUM_LAYERS - 1):
        assert isinstance(functions[layer].step, DirectCall)
        assert functions[layer].down.owner is not None
        assert functions[layer].up.owner is not None
        added, state = functions[layer](torch.arange(5), hidden, residual)
        torch.testing.assert_close(added + state, bypass.apply(layer, hidden + residual), atol=ATOL, rtol=0)


def test_a_draft_pass_has_one_compiled_function_beside_its_layers(compiled: Engine) -> None:
    """Fails if a gap or the adapter of an exit is computed with other weights, at another layer, or uncompiled."""
    from vllm_buddy.serving.forward.direct_call import DirectCall
    from vllm_buddy.serving.worker.depth_drafts import _PassFunctions

    (exit_,) = random_exits(compiled.tiny.model, [4], seed=1, gaps=True)
    own = _PassFunctions.of(DraftPass(exit_.path, 0.3, exit_.adapter, exit_.bypass), compiled.core.vllm_config)
    assert own.bypasses is not None
    assert exit_.bypass is not None
    hidden, residual = torch.randn(2, 5, HIDDEN_SIZE)
    wanted = {layer: exit_.bypass.apply(layer, hidden + residual) for layer in gap_starts(exit_.path)}
    found = {layer: function for layer, function in enumerate(own.bypasses) if function is not None}
    assert found.keys() == wanted.keys()
    calls = [
        *((found[layer], wanted[layer]) for layer in wanted),
        (own.adapter, exit_.adapter.apply(hidden + residual)),
    ]
    for call, state_after in calls:
        assert isinstance(call.step, DirectCall)  # type: ignore[union-attr]
        added, state = call(torch.arange(5), hidden, residual)  # type: ignore[misc]
        torch.testing.assert_close(added + state, state_after, atol=ATOL, rtol=0)
    assert len({id(call.step) for call, _ in calls}) == 1  # type: ignore[union-attr]


def check_skipped_rows(engine: Engine) -> None:
    """Compare K and V that come with the bypass with those of the KV policy."""
    from vllm_buddy.serving.forward.direct_call import DirectCall
    from vllm_buddy.serving.kv.kv_only import KVOnly

    backbone, bypass = engine.runner.model.model, engine.tiny.artifact.bypass
    hidden, residual = torch.randn(2, 5, HIDDEN_SIZE)
    positions, slots = torch.tensor([3, 9, 0, 40, 7]), torch.arange(5)
    for index in range(1, NUM_LAYERS - 1):
        call, layer = backbone.bypasses[index], backbone.layers[index]
        assert isinstance(call.step, DirectCall)
        added, state = call(positions, hidden, residual, slots)
        torch.testing.assert_close(added + state, bypass.apply(index, hidden + residual), atol=ATOL, rtol=0)
        written = layer.self_attn.attn.kv_cache.clone()
        KVOnly.write_skipped(engine.state.policy, layer, positions, hidden, residual, slots)
        torch.testing.assert_close(written, layer.self_attn.attn.kv_cache, atol=ATOL, rtol=0)


def test_k_and_v_of_skipped_rows_come_with_the_bypass(compiled: Engine) -> None:
    """Fails if the one function for bypass, K and V leaves out a rotation or a norm's weight, or runs uncompiled."""
    check_skipped_rows(compiled)


def test_the_last_norm_is_called_directly(compiled: Engine) -> None:
    """Fails if the last norm runs as half a dozen operations of torch, or through its wrappers, at every step."""
    from vllm_buddy.serving.forward.direct_call import DirectCall

    backbone = compiled.runner.model.model
    assert isinstance(backbone.last_norm, DirectCall)
    hidden, residual = torch.randn(2, 5, HIDDEN_SIZE)
    expected, _ = backbone.norm.forward_native(hidden.clone(), residual.clone())
    torch.testing.assert_close(backbone.last_norm(hidden, residual)[0], expected, atol=ATOL, rtol=0)


def test_layers_that_are_alike_are_compiled_once(compiled: Engine) -> None:
    """Fails if every layer is compiled again, for seconds each, or layers that share code share weights too."""
    first, *others = compiled.runner.model.model.functions
    assert len({function._code for function in others}) == 1
    assert first._code != others[0]._code  # it has no residual
    templates = [[id(value) for value in function._template] for function in others]
    assert len(set(map(tuple, templates))) == len(others)


@pytest.mark.parametrize("difference", ["constant", "shape"])
def test_a_layer_that_differs_is_not_bound_to_the_code_of_another(
    compiled: Engine, monkeypatch: pytest.MonkeyPatch, difference: str
) -> None:
    """Fails if a constant that was compiled into the code of one layer is applied to another."""
    from vllm_buddy.serving.forward.compiled import _bind

    backbone, config = compiled.runner.model.model, compiled.core.vllm_config
    pattern, layer, call = backbone.layers[1], backbone.layers[2], backbone.functions[1]
    assert _bind(pattern, call, layer, config) is not None
    norm = layer.post_attention_layernorm
    if difference == "constant":
        monkeypatch.setattr(norm, "variance_epsilon", 1.0)
    else:
        monkeypatch.setattr(norm, "weight", torch.nn.Parameter(norm.weight.data.repeat(2)))
    assert _bind(pattern, call, layer, config) is None


def test_paths_and_batch_sizes_compile_nothing_new(compiled: Engine) -> None:
    """Fails if a path, a batch size or a prompt length makes a graph of its own."""
    from vllm_buddy.serving.forward.direct_call import DirectCall

    functions = compiled.runner.model.model.functions
    assert len(functions) == compiled.runner.buddy_state.policy.num_layers
    assert all(isinstance(function, DirectCall) for function in functions)
    compiled.configure("masked", 1)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for num_requests in (1, 3, 8):
        compiled.run(batch(seed=num_requests, max_prompt=30 * num_requests)[:num_requests])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_ranks_decide_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a rank binds a layer that another one compiles alone: their all-reduces would wait for each other."""
    from vllm_buddy.serving.forward import compiled as compiled_module

    def another_refuses(tensor: torch.Tensor, op: object, group: object) -> None:
        assert (op, group) == (torch.distributed.ReduceOp.MIN, "ranks")
        tensor.clamp_(max=0)

    monkeypatch.setattr(compiled_module, "get_tp_group", lambda: SimpleNamespace(world_size=2, cpu_group="ranks"))
    monkeypatch.setattr(torch.distributed, "all_reduce", another_refuses)
    assert not compiled_module._on_all_ranks(True)
