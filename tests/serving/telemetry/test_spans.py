"""The outcome of a request in the span that vLLM traces for it."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_buddy.serving import patches


def test_vllms_span_has_budget_and_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the span of a request does not tell what it ran, or tells what another one ran."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from vllm.v1.engine.output_processor import OutputProcessor

    patches.apply()
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)

    def trace_request(number: int, kv_transfer_params: dict[str, Any] | None) -> None:
        stats = SimpleNamespace(
            arrival_time=1.0,
            scheduled_ts=1.0,
            queued_ts=1.0,
            first_token_ts=1.0,
            last_token_ts=1.0,
            first_token_latency=0.1,
            num_generation_tokens=3,
        )
        state = SimpleNamespace(
            stats=stats,
            prompt_token_ids=[1],
            prompt_embeds=None,
            external_req_id=f"r{number}",
            top_p=None,
            max_tokens_param=3,
            temperature=None,
            n=1,
        )
        output = SimpleNamespace(trace_headers=None, kv_transfer_params=kv_transfer_params)
        OutputProcessor.do_tracing(None, output, state, SimpleNamespace(iteration_timestamp=2.0))

    outcome = {"budget": 0.5, "depth": 4, "price": None, "auto": False, "prompt": {"tokens": 1}}
    trace_request(0, {"buddy": outcome})
    trace_request(1, {"buddy": {**outcome, "depth": 8}})
    trace_request(2, None)
    told = [
        {key: value for key, value in span.attributes.items() if key.startswith("vllm_buddy.")}
        for span in exporter.get_finished_spans()
    ]
    assert [span.name for span in exporter.get_finished_spans()] == ["llm_request"] * 3
    assert told[0] == {"vllm_buddy.budget": 0.5, "vllm_buddy.depth": 4, "vllm_buddy.auto": False}
    assert (told[1]["vllm_buddy.depth"], told[2]) == (8, {})
