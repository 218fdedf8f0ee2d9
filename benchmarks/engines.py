"""Engines that live side by side in one process, and the timing of their decode steps."""

import os
import time
from dataclasses import dataclass
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: engines in this process, none spinning
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams


@dataclass
class Variant:
    """One thing to measure: an engine and the budgets of its requests (None: stock vLLM)."""

    name: str
    layers: int
    llm: LLM
    budget: float | None = None


@dataclass
class DecodeRun:
    """Decode steps of one run. step_ms: one entry a step, prefill left out. token_ids: per request."""

    step_ms: list[float]
    token_ids: list[list[int]]


def start_engine(model: str, dtype: str = "auto", **options: Any) -> LLM:
    """An engine with settings that are the same for everything compared."""
    return LLM(
        model,
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=64,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # every run pays its own prefill
        **options,
    )


def decode(variant: Variant, prompts: list[list[int]], num_tokens: int) -> DecodeRun:
    """Greedy decoding of all prompts at once, every engine step timed from outside."""
    engine = variant.llm.llm_engine
    extra = None if variant.budget is None else {"buddy_budget": variant.budget}
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=extra)
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{variant.name}-{time.monotonic_ns()}-{i}", {"prompt_token_ids": prompt}, params)
    step_ms: list[float] = []
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        step_ms.append((time.perf_counter() - started) * 1e3)
        for output in outputs:
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    # The first step is the prefill of all prompts, the last ones may run fewer rows.
    return DecodeRun(step_ms[1:num_tokens], list(tokens.values()))


def core(llm: LLM) -> Any:
    """The engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]


def model_runner(llm: LLM) -> Any:
    """The model runner of an in-process engine."""
    return core(llm).model_executor.driver_worker.worker.model_runner
