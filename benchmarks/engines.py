"""Engines that live side by side in one process, and the timing of their decode steps."""

import os
import time
from dataclasses import dataclass, field
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: engines in this process, none spinning
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm import LLM, SamplingParams

from vllm_buddy.method import Path, PathSchedule, Router

NUM_LIKELIEST = 20  # tokens of a distribution that are compared; the most that vLLM gives


@dataclass
class Variant:
    """One thing to measure: an engine, and for buddy the budget of its requests, their router and its schedule.

    layers: per token. path: what stock vLLM runs, as layers of the whole model; None for buddy.
    """

    name: str
    layers: int
    llm: LLM
    path: Path | None = None
    budget: float | None = None
    router: Router | None = None
    schedule: PathSchedule = field(default_factory=PathSchedule)

    @property
    def extra_args(self) -> dict[str, Any] | None:
        """What its requests say to the plugin."""
        return None if self.budget is None else {"buddy_budget": self.budget}

    def prepare(self) -> None:
        """Set router and schedule of the engine, which several variants share."""
        if self.router is not None:
            scheduler = core(self.llm).scheduler
            scheduler._router, scheduler._schedule = self.router, self.schedule


@dataclass
class DecodeRun:
    """Steps of one run. all_ms: one entry a step; step_ms: the decode steps. token_ids: per request."""

    all_ms: list[float]
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
    variant.prepare()
    params = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=variant.extra_args
    )
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
    return DecodeRun(step_ms, step_ms[1:num_tokens], list(tokens.values()))


def second_token_logprobs(variant: Variant, prompts: list[list[int]]) -> list[dict[int, float]]:
    """The likeliest tokens, and their logprobs, of the first decode step after each prompt.

    The token before is fixed, the same for every engine: the last of the prompt again.
    """
    variant.prepare()
    params = [
        SamplingParams(
            temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, logprobs=NUM_LIKELIEST,
            extra_args=variant.extra_args, logit_bias={prompt[-1]: 100.0},
        )
        for prompt in prompts
    ]  # fmt: skip
    outputs = variant.llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [{t: lp.logprob for t, lp in output.outputs[0].logprobs[1].items()} for output in outputs]


def core(llm: LLM) -> Any:
    """The engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def model_runner(llm: LLM) -> Any:
    """The model runner of an in-process engine."""
    return core(llm).model_executor.driver_worker.worker.model_runner
