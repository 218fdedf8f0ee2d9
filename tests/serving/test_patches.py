"""What the plugin changes in vLLM, once and only for its own models."""

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import BASE
from tests.harness.vllm_originals import original
from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving import patches
from vllm_buddy.serving.compat import units_problem
from vllm_buddy.serving.patches import answers, engine_core
from vllm_buddy.serving.patches.architectures import ROUTED_ARCHITECTURES
from vllm_buddy.serving.patches.wrapping import MARK


def test_sleep_that_would_lose_the_bypass_is_refused_before_anything_is_paused() -> None:
    """Fails if a server that slept serves what is left of a bypass, or one that refuses to sleep has stopped."""
    from vllm.v1.engine.core import EngineCore

    engine_core.wrap_sleep()
    called: list[Any] = []
    engine: Any = SimpleNamespace(
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(model_impl="buddy")),
        pause_scheduler=lambda **_: called.append("pause"),
        model_executor=SimpleNamespace(sleep=called.append),
    )
    with pytest.raises(UnsupportedError, match="level 1 only"):
        EngineCore.sleep(engine, 2)
    assert called == []
    EngineCore.sleep(engine, 1)
    engine.vllm_config.model_config.model_impl = "auto"
    EngineCore.sleep(engine, level=2)
    assert called == ["pause", 1, "pause", 2]


def test_streams_in_another_protocol_tell_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if Anthropic's converter gets chunks without choices, which end the message for its clients."""

    class Serving:
        model_config = None

        async def stream(self, request: Any, result_generator: Any) -> Any:
            async for _ in result_generator:
                yield 'data: {"choices": [{"index": 0, "finish_reason": null}]}\n\n'

    class Converting(Serving):
        pass

    async def results() -> Any:
        yield SimpleNamespace(kv_transfer_params={"buddy": {"paths": {}}})

    async def chunks(serving: Serving) -> list[Any]:
        request = SimpleNamespace(vllm_xargs={"buddy_paths": True}, use_beam_search=False)
        return [json.loads(chunk[6:])["choices"] async for chunk in serving.stream(request, results())]

    monkeypatch.setattr(answers, "is_routed", lambda serving: True)
    answers.wrap_stream(Serving, "stream")
    assert len(asyncio.run(chunks(Serving()))) == 2
    assert len(asyncio.run(chunks(Converting()))) == 1


def test_applying_the_patches_again_changes_nothing() -> None:
    """Fails if vLLM, which loads plugins in several places, wraps a method twice."""
    import vllm.entrypoints.openai.api_server  # noqa: F401 - streams are wrapped in its process only
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
    from vllm.model_executor.models.registry import _ModelRegistry
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.core_client import DPLBAsyncMPClient, MPClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.output_processor import OutputProcessor, RequestState
    from vllm.v1.metrics.loggers import StatLoggerManager

    def found() -> tuple[Callable[..., Any], ...]:
        return (
            _ModelRegistry._normalize_arch,
            SamplingParams.verify,
            InputProcessor.process_inputs,
            RequestState.make_request_output,
            RequestOutput.add,
            *(() if units_problem() else (kv_cache_utils.get_kv_cache_groups,)),
            DPLBAsyncMPClient.get_core_engine_for_request,
            EngineCoreProc._make_ready_response,
            EngineCore.sleep,
            MPClient._apply_ready_response,
            StatLoggerManager.__init__,
            OutputProcessor.do_tracing,
            OpenAIServingChat.chat_completion_stream_generator,
            OpenAIServingCompletion.completion_stream_generator,
            OpenAIServingResponses._generate_with_builtin_tools,
            AsyncLLM.generate,
        )

    patches.apply()
    before = found()
    patches.apply()
    assert found() == before
    for wrapped in before:
        assert hasattr(wrapped, MARK)
        assert not hasattr(original(wrapped), MARK)


@pytest.mark.parametrize("architecture", [*ROUTED_ARCHITECTURES, "GemmaForCausalLM"])
@pytest.mark.parametrize("model_impl", ["auto", "vllm", "transformers"])
def test_other_model_implementations_see_vllms_own_registry(architecture: str, model_impl: str) -> None:
    """Fails if the plugin changes which class serves a model that did not ask for routing."""
    from types import SimpleNamespace

    from vllm.model_executor.models import ModelRegistry

    config = SimpleNamespace(model_impl=model_impl, convert_type="none", runner_type="generate")
    patched = ModelRegistry._normalize_arch(architecture, config)
    assert patched == original(type(ModelRegistry)._normalize_arch)(ModelRegistry, architecture, config)
    assert not patched.startswith("Buddy")


def test_other_model_implementations_are_configured_as_without_the_plugin(tiny: Callable[[str], Tiny]) -> None:
    """Fails if the plugin leaves a trace in the configuration of a stock server, or checks its requests."""
    from vllm import EngineArgs, SamplingParams

    options = {**BASE, "model_impl": "auto", "model": str(tiny("llama").folder)}
    config = EngineArgs(**options, additional_config={"buddy": {"nonsense": 1}}).create_engine_config()
    assert config.scheduler_config.scheduler_cls is None
    assert "buddy" not in config.parallel_config.worker_cls.lower()
    assert not hasattr(config.model_config, "buddy_limits")
    params = SamplingParams(extra_args={"buddy_budget": "no number", "buddy_other": 1})
    params.verify(config.model_config, None, config.structured_outputs_config, None)


def test_the_registered_classes_exist_and_are_routed() -> None:
    """Fails if a class named in the table cannot be imported, which vLLM would find out in its worker."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_buddy.serving.forward import models
    from vllm_buddy.serving.start.hook import BuddyModelConfig

    for stock, routed in ROUTED_ARCHITECTURES.items():
        cls = getattr(models, routed)
        assert stock in [base.__name__ for base in cls.__mro__]
        assert issubclass(cls, models._Routed)
        assert routed in ModelRegistry.models
        assert MODELS_CONFIG_MAP[routed] is BuddyModelConfig
