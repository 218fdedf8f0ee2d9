"""A server with `max_budget` holds the layers that its paths reach and no others, and serves them as before."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.harness import batches
from tests.harness.engine import BLOCK_SIZE, Ask, Engine, Tiny, make_tiny, start_engine
from tests.harness.tiny_models import FAMILIES, NUM_LAYERS, PREDICTOR_DEPTHS, load_model
from tests.serving.end_to_end import test_adapters, test_pipeline_parallel
from vllm_buddy.method import PathSchedule, path_of
from vllm_buddy.method.kv_policy import KV_POLICIES, MASKED

MAX_BUDGET = 0.625  # five of eight layers
BUDGETS = (0.625, 0.5, 0.4, 0.625, 0.5, 0.4, 0.5, 0.625)
# Paths of three to five layers hold neither layer 3 nor layer 5; paths of six do.
LIBRARY = {
    3: [[0, 1, 7], [0, 4, 7]],
    4: [[0, 1, 2, 7], [0, 4, 6, 7], [0, 2, 6, 7]],
    5: [[0, 1, 2, 4, 7], [0, 2, 4, 6, 7], [0, 1, 4, 6, 7]],
    6: [[0, 1, 2, 3, 5, 7], [0, 1, 3, 4, 6, 7]],
}
HELD, ABSENT = (0, 1, 2, 4, 6, 7), (3, 5)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Model and artifact of a family, with the library above."""
    made: dict[str, Tiny] = {}

    def get(family: str) -> Tiny:
        if family not in made:
            tiny = make_tiny(tmp_path_factory.mktemp(family), family, bypass_rank=4, predictor_depths=PREDICTOR_DEPTHS)
            config = tiny.artifact.config.model_copy(update={"library": LIBRARY})
            tiny.artifact = replace(tiny.artifact, config=config)
            tiny.artifact.save(tiny.artifact_folder)
            made[family] = tiny
        return made[family]

    return get


@pytest.fixture(scope="module")
def servers(narrow: Callable[[str], Tiny]) -> Callable[..., Engine]:
    """Engines with max_budget, by family and settings, started once."""
    started: dict[Any, Engine] = {}

    def get(family: str = "llama", **settings: Any) -> Engine:
        key = family, json.dumps(settings)
        if key not in started:
            buddy = {"max_budget": MAX_BUDGET, "paths": "library", **settings.pop("buddy", {})}
            started[key] = start_engine(narrow(family), buddy=buddy, **settings)
        return started[key]

    return get


@pytest.fixture(params=FAMILIES)
def server(request: pytest.FixtureRequest, servers: Callable[..., Engine]) -> Iterator[Engine]:
    """An engine with max_budget of each family."""
    engine = servers(request.param)
    yield engine
    engine.abort_all()


@pytest.fixture
def llama(servers: Callable[..., Engine]) -> Iterator[Engine]:
    engine = servers()
    yield engine
    engine.abort_all()


def batch(seed: int) -> list[Ask]:
    return [Ask(ask.prompt, budget, 20) for ask, budget in zip(batches.batch(seed), BUDGETS)]


@pytest.mark.parametrize("policy", KV_POLICIES)
@pytest.mark.parametrize(("interval", "bypass"), [(0, False), (1, True)])
def test_tokens_equal_the_reference_of_the_whole_model(
    server: Engine, policy: str, interval: int, bypass: bool
) -> None:
    """Fails if a path needs what is not loaded, or a row goes past a layer that is not loaded without its bypass."""
    server.configure(policy, interval, chunk=33, library=True, bypass=bypass)
    asks = batch(seed=interval)

    def disturb(step: int) -> None:
        if step in (3, 9):
            server.preempt(step)

    server.check(asks, server.run(asks, before_step=disturb))


@pytest.mark.parametrize("policy", [MASKED, "kv_only"])
def test_tokens_of_replayed_steps_equal_the_reference(servers: Callable[..., Engine], policy: str) -> None:
    """Fails if graphs are captured of layers that are not loaded, or kernels leave out their bypasses."""
    engine = servers(buddy={"kernels": "reference"})
    engine.configure(policy, 4, library=True)
    asks = batch(seed=5)
    engine.check(asks, engine.run(asks))
    engine.capture((1, 2, 4, 8))
    engine.check(asks, engine.run(asks))


@pytest.mark.slow
@pytest.mark.parametrize("policy", [MASKED, "kv_only"])
def test_tokens_of_compiled_layers_equal_the_reference(servers: Callable[..., Engine], policy: str) -> None:
    """Fails if a compiled layer, or a bypass with K and V, stands at the place of another one."""
    engine = servers(enforce_eager=False)
    engine.configure(policy, 1, library=True)
    asks = batch(seed=6)
    engine.check(asks, engine.run(asks))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks_give_the_reference_answers(narrow: Callable[[str], Tiny], tmp_path: Path, parallel: str) -> None:
    """Fails if a rank counts the layers of its stage from another one, or needs what it does not hold."""
    llama, asks = narrow("llama"), batch(seed=7)
    settings = {"max_budget": MAX_BUDGET, "paths": "library", "kv_policy": "kv_only"}
    ((_, answers),) = test_pipeline_parallel.serve(
        llama, tmp_path / "serve.py", [asks], settings=settings, enforce_eager=True, **{parallel: 2}
    )
    test_pipeline_parallel.check(llama, asks, answers, "kv_only", library=True)


def test_absent_layers_have_neither_weights_nor_kv(llama: Engine, engine_of: Callable[[str], Engine]) -> None:
    """Fails if a layer that no path reaches takes memory, or what it leaves is not used for more KV blocks."""
    whole = engine_of("llama")
    backbone = llama.runner.model.model
    layers = {int(name.split(".")[1]) for name, _ in backbone.named_parameters() if name.startswith("layers.")}
    assert layers == set(HELD)
    assert [function is None for function in backbone.functions] == [i in ABSENT for i in range(NUM_LAYERS)]
    names = llama.core.vllm_config.compilation_config.static_forward_context
    assert {int(name.split(".")[2]) for name in names} == set(HELD)
    assert len(llama.runner.kv_caches) == len(HELD)
    blocks, of_whole = (engine.core.vllm_config.cache_config.num_gpu_blocks for engine in (llama, whole))
    assert blocks == pytest.approx(of_whole * NUM_LAYERS / len(HELD), abs=1)
    assert llama.core.vllm_config.model_config.buddy_limits.layers == path_of(HELD)


def test_runs_without_requests_call_layers_that_are_there(llama: Engine) -> None:
    """Fails if vLLM's profiling calls a layer that is not loaded."""
    llama.runner._dummy_run(4 * BLOCK_SIZE)


def refused(engine: Engine, budget: float | None, **options: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as caught:
        engine.add(Ask((1, 2, 3), budget, 2, options=options))
    return caught.value


def test_budgets_above_are_refused_with_what_is_allowed(llama: Engine) -> None:
    """Fails if a request above max_budget is served on fewer layers, or reaches the engine."""
    for budget in (0.626, 0.75, 1.0):
        error = refused(llama, budget)
        assert error.parameter == "vllm_xargs.buddy_budget"
        assert "allowed are 0.375 to 0.625" in str(error)
    assert refused(llama, 0.5, buddy_prompt="full").parameter == "vllm_xargs.buddy_prompt"
    error = refused(llama, None, buddy_budget="auto", buddy_auto_max=0.75)
    assert error.parameter == "vllm_xargs.buddy_auto_max"
    assert "0.375 to 0.625" in str(error)


def test_a_session_that_would_run_all_layers_is_refused(llama: Engine) -> None:
    """Fails if a streaming-input session, which runs at full depth, reaches an engine without all layers."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    processor = llama.llm.llm_engine.input_processor
    with pytest.raises(VLLMValidationError, match=r"largest budget that a request may ask for is 0\.625"):
        processor.process_inputs(
            "session", {"prompt_token_ids": [1, 2]}, SamplingParams(max_tokens=2), ("generate",), resumable=True
        )


def test_defaults_stay_within(llama: Engine) -> None:
    """Fails if a request without a budget, or with "auto" at no price, runs more than max_budget."""
    llama.configure(MASKED, 0, library=True)
    asks = [Ask((5, 6, 7), None, 2), Ask((5, 6, 7), None, 2, options={"buddy_budget": "auto", "buddy_price": 0.0})]
    whole, auto = (output.kv_transfer_params["buddy"] for output in llama.run(asks))
    assert (whole["budget"], whole["depth"]) == (0.625, 5)
    assert auto["depth"] == 4  # the largest of the predictor's grid of 3, 4, 6 and 8


@pytest.mark.slow
def test_adapters_of_layers_that_are_absent_are_left_out(narrow: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Fails if a LoRA adapter of all layers stops a server without some of them, or lands on other layers."""
    from vllm.lora.request import LoRARequest

    tiny = narrow("qwen2")
    model = load_model(tiny.folder)
    test_adapters.write_adapter(tmp_path / "adapter", model, seed=1).merge_into(model)
    adapted = Tiny(tiny.folder, tiny.artifact_folder, model, tiny.artifact)
    engine = start_engine(
        tiny,
        buddy={"max_budget": MAX_BUDGET, "paths": "library", "kv_policy": MASKED},
        enable_lora=True,
        max_lora_rank=test_adapters.RANK,
    )
    engine.configure(MASKED, 4, library=True)
    asks = [replace(ask, adapter=LoRARequest("one", 1, str(tmp_path / "adapter"))) for ask in batch(seed=8)]
    for ask, output in zip(asks, engine.run(asks), strict=True):
        expected = adapted.expected(ask, MASKED, PathSchedule(4), library=True)
        assert list(output.outputs[0].token_ids) == expected.token_ids
