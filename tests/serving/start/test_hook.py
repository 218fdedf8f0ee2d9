"""What the config hook puts in place, and what it says of it. No engine is started here."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.platforms import current_platform

from tests.harness.engine import Tiny
from tests.harness.server_config import DRAFTS, NGRAM, configure, refusal
from tests.harness.tiny_models import (
    NUM_LAYERS,
    PREDICTOR_DEPTHS,
)
from vllm_buddy.method import path_of
from vllm_buddy.serving.admission.auto_limits import AutoLimits
from vllm_buddy.serving.compat import TESTED_VLLM
from vllm_buddy.serving.start import hook
from vllm_buddy.serving.start.settings import engine_settings


def test_a_good_configuration_gets_our_scheduler_and_worker(llama_model: Tiny) -> None:
    """Fails if the refusals below come from somewhere else, or routing is not put in place."""
    config = configure(llama_model)
    assert config.scheduler_config.scheduler_cls == "vllm_buddy.serving.schedule.scheduler.make_scheduler"
    assert config.parallel_config.worker_cls.startswith("vllm_buddy.serving.worker.worker.")
    assert config.model_config.buddy_limits.num_layers == 8


@pytest.mark.parametrize("speculator", [None, NGRAM], ids=["alone", "drafts"])
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_the_worker_and_what_is_compiled_follow_the_device(
    llama_model: Tiny, speculator: dict[str, Any] | None, on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a GPU gets the worker of CPUs or a model compiled as a whole, which has fixed layers.

    Or if drafts are scheduled asynchronously: vLLM decides on that after the hook, where nobody has.
    """
    config = configure(llama_model, {"kernels": "reference"}, enforce_eager=False, speculative_config=speculator)
    config.parallel_config.worker_cls, config.scheduler_config.scheduler_cls = "auto", None
    config.scheduler_config.async_scheduling = None
    compilation = config.compilation_config
    compilation.mode, compilation.cudagraph_mode = CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE
    monkeypatch.setattr(current_platform, "is_cpu", lambda: not on_gpu)
    hook.BuddyModelConfig.verify_and_update_config(config)
    assert config.parallel_config.worker_cls == (hook.GPU_WORKER if on_gpu else hook.CPU_WORKER)
    assert hook.GPU_WORKER.endswith("BuddyGPUWorker")
    assert hook.CPU_WORKER.endswith("BuddyCPUWorker")
    unchanged = CompilationMode.VLLM_COMPILE, CUDAGraphMode.FULL_AND_PIECEWISE
    expected = (CompilationMode.NONE, CUDAGraphMode.NONE) if on_gpu else unchanged
    assert (compilation.mode, compilation.cudagraph_mode) == expected
    assert config.scheduler_config.async_scheduling is (None if speculator is None else False)


def test_the_lossless_drafter_lets_requests_ask_for_it(llama_model: Tiny) -> None:
    """Fails if a server without the drafter accepts the mode, or one with it does not."""
    assert not configure(llama_model).model_config.buddy_limits.lossless
    assert not configure(llama_model, speculative_config=NGRAM).model_config.buddy_limits.lossless
    assert configure(llama_model, speculative_config=DRAFTS).model_config.buddy_limits.lossless


def test_auto_reaches_the_limits_of_requests_and_the_log(llama_model: Tiny, said: list[str]) -> None:
    """Fails if a setting is dropped on the way, or the operator cannot see what "auto" will do."""
    settings = {"min_budget": 0.45, "auto": {"price": 2.0}, "load": {"price": 9, "floor": 0.8, "waiting": [0, 4]}}
    config = configure(llama_model, {"default_budget": "auto", **settings})
    limits = config.model_config.buddy_limits
    assert limits.default_budget == "auto"
    assert limits.auto == AutoLimits(NUM_LAYERS, PREDICTOR_DEPTHS, 0.45, 1.0, 2.0, 9.0, 0.8)
    told = 'default budget auto, from 0.45 to 1, "auto" chooses among 0.45, 0.5, 0.8, 1 at price 2, 9 when fully loaded'
    assert any(line.endswith(told) for line in said)
    settings = {"min_budget": 0.45, "slo": {"itl_ms": 50, "floor": 0.5}}
    keeping = configure(llama_model, settings)
    assert keeping.model_config.buddy_limits.auto.objectives_s == {"itl": 0.05}
    told = "0.8, 1 at price 8, down to 0.5 as far as it takes to keep p99 of itl within 50 ms"
    assert any(line.endswith(told) for line in said)
    assert engine_settings(keeping).slo.itl_ms == 50
    # The engine's process reads them again; what nobody gave must not look given there.
    read = engine_settings(config)
    assert read.load.waiting == (0, 4)
    assert read.load.price == 9
    assert "kv_use" not in read.load.model_fields_set


def test_max_budget_says_what_it_saves(llama_model: Tiny, few_depths: Path, said: list[str]) -> None:
    """Fails if layers are dropped that a router might choose, or a setting that saves nothing looks as if it did."""
    limits = configure(llama_model, {"max_budget": 0.65, "paths": "free"}).model_config.buddy_limits
    assert limits.layers == (1 << NUM_LAYERS) - 1
    assert limits.default_budget == 0.65
    assert limits.auto.largest == 0.65
    assert "max_budget 0.65 saves no memory" in "".join(said)
    narrow = {"max_budget": 0.65, "default_budget": 0.5, "artifact": str(few_depths)}
    assert configure(llama_model, narrow).model_config.buddy_limits.layers == path_of([0, 2, 3, 7])
    assert "from 0.375 to 0.65 on 4 of 8 layers" in "".join(said)
    message = refusal(llama_model, narrow, pipeline_parallel_size=4)
    assert "leaves no layer to pipeline stage 2, which has layers 4 to 5" in message


def test_a_vllm_that_was_not_tried_is_told(llama_model: Tiny, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an operator with another vLLM looks for a fault elsewhere, or one with a tried vLLM is worried."""
    configure(llama_model)
    assert not any("was tested with" in line for line in said)
    monkeypatch.setattr("vllm.__version__", "0.99.0+cpu")
    configure(llama_model)
    (line,) = (line for line in said if "was tested with" in line)
    assert ", ".join(TESTED_VLLM) in line
    assert line.endswith("this is 0.99.0")


def test_budgets_below_those_of_the_training_are_told(llama_model: Tiny, tmp_path: Path, said: list[str]) -> None:
    """Fails if an operator does not learn that requests may ask for what nothing was trained for."""

    def told(**buddy: Any) -> list[str]:
        said.clear()
        configure(llama_model, {"artifact": str(tmp_path / "trained"), **buddy})
        return [line for line in said if "was trained for budgets from" in line]

    config = llama_model.artifact.config.model_copy(update={"budgets": (0.5, 1.0)})
    replace(llama_model.artifact, config=config).save(tmp_path / "trained")
    for buddy in ({}, {"min_budget": 0.4}):
        (line,) = told(**buddy)
        assert "artifact 'artifact' was trained for budgets from 0.5 up" in line
        assert "min_budget refuses them" in line
    assert told(min_budget=0.5) == told(min_budget=0.6) == []


def test_an_untrained_artifact_is_told(llama_model: Tiny, tmp_path: Path, said: list[str]) -> None:
    """Fails if an operator who serves layers by importance alone looks for the fault elsewhere, or a trained one is
    called so."""
    for recipe in (None, "bypass"):
        config = llama_model.artifact.config.model_copy(update={"recipe": recipe})
        replace(llama_model.artifact, config=config).save(tmp_path / "artifact")
        said.clear()
        configure(llama_model, {"artifact": str(tmp_path / "artifact")})
        assert any("is untrained" in line for line in said) == (recipe is None)


@pytest.mark.parametrize("buddy", [{"load": {"price": 90.0}}, {"slo": {"itl_ms": 50}}])
def test_what_load_does_not_lower_is_told(llama_model: Tiny, said: list[str], buddy: dict[str, Any]) -> None:
    """Fails if an operator who sets an objective does not learn that requests without a budget are not lowered."""
    configure(llama_model, buddy)
    (line,) = (line for line in said if 'of budget "auto" only' in line)
    assert "run at default_budget 1" in line
    said.clear()
    configure(llama_model, {**buddy, "default_budget": "auto"})
    assert not [line for line in said if 'of budget "auto" only' in line]
