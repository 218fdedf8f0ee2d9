"""Budget and depth of a request as attributes of the span that vLLM traces for it (`--otlp-traces-endpoint`)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from opentelemetry import trace
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

_ATTRIBUTES = ("mode", "budget", "depth", "auto", "price", "lowered_to", "layers_executed_mean", "reroutes")

_extended: WeakSet[TracerProvider] = WeakSet()
_outcome: ContextVar[Mapping[str, Any] | None] = ContextVar("vllm_buddy_outcome", default=None)


class _OutcomeOnSpans(SpanProcessor):
    """Adds the outcome of the request at hand to each span that starts within `spans_with_outcome`."""

    def on_start(self, span: Any, parent_context: Any = None) -> None:  # noqa: ARG002 - OpenTelemetry's interface
        outcome = _outcome.get() or {}
        # None is no value of an attribute.
        told = {f"vllm_buddy.{key}": outcome[key] for key in _ATTRIBUTES if outcome.get(key) is not None}
        span.set_attributes(told)


@contextmanager
def spans_with_outcome(outcome: Mapping[str, Any]) -> Iterator[None]:
    """Let spans that start within have the attributes of a request's outcome. outcome: see Outcome.as_dict."""
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider) and provider not in _extended:
        provider.add_span_processor(_OutcomeOnSpans())
        _extended.add(provider)
    token = _outcome.set(outcome)
    try:
        yield
    finally:
        _outcome.reset(token)
