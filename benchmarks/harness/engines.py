"""Starts several vLLM engines side by side in one process and times their decode steps."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported: engines in this process, no busy waiting
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# vLLM 0.32 writes ahead-of-time artifacts on CPU that it cannot load, so every start would compile again.
os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")

from vllm import LLM, SamplingParams

from benchmarks.harness.reference_check import NUM_LIKELIEST, Routing
from benchmarks.harness.result_rows import device
from benchmarks.harness.rounds import Refused

MOST_REQUESTS = 64  # in one batch


@dataclass(kw_only=True)
class Variant(Routing):
    """One thing to measure: an engine in this process and how it routes its requests."""

    llm: LLM

    def prepare(self) -> None:
        """Set the engine's router, schedule and bypasses. Several variants share an engine."""
        if self.router is not None:
            scheduler = core(self.llm).scheduler
            routes = scheduler._routes
            routes.router, routes.schedule, routes._by_token = self.router, self.schedule, self.by_token
            _use_bypass(self.llm, self.bypass)


@dataclass
class DecodeRun:
    """Steps of one run.

    all_ms: ms of every step. step_ms: ms of the decode steps.
    token_ids, token_steps: for each request, in the order sent, its tokens and the steps in which they arrived.
    """

    all_ms: list[float]
    step_ms: list[float]
    token_ids: list[list[int]]
    token_steps: list[list[int]]


def start_engine(model: str, dtype: str = "auto", **options: Any) -> LLM:
    """Start an engine with the settings that everything compared shares."""
    return LLM(
        model,
        dtype=dtype,
        max_model_len=2048,
        max_num_seqs=MOST_REQUESTS,
        kv_cache_memory_bytes=4 << 30 if device() == "cuda" else 1 << 30,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # every run pays its own prefill
        **options,
    )


def decode(variant: Variant, prompts: Sequence[list[int]], num_tokens: int) -> DecodeRun:
    """Decode all prompts greedily at once and time every engine step from outside."""
    return decode_together([(variant, prompt) for prompt in prompts], num_tokens)


def decode_together(asked: Sequence[tuple[Variant, list[int]]], num_tokens: int) -> DecodeRun:
    """Do the same for prompts of several variants of one engine, which differ only in their budgets."""
    variant = asked[0][0]
    if len(asked) > MOST_REQUESTS:
        raise Refused(f"{len(asked)} requests would wait for each other; an engine here runs {MOST_REQUESTS} at a time")
    engine = variant.llm.llm_engine
    variant.prepare()
    order = []
    for i, (one, prompt) in enumerate(asked):
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, extra_args=one.extra_args
        )
        order.append(f"{one.name}-{time.monotonic_ns()}-{i}")
        engine.add_request(order[-1], {"prompt_token_ids": prompt}, params)
    step_ms: list[float] = []
    tokens: dict[str, list[int]] = {}
    token_steps: dict[str, list[int]] = {name: [] for name in order}
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        step_ms.append((time.perf_counter() - started) * 1e3)
        for output in outputs:
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            token_steps[output.request_id].append(len(step_ms) - 1)
    # The first step is the prefill of all prompts. The last steps may run fewer rows.
    return DecodeRun(
        step_ms, step_ms[1:num_tokens], [tokens[name] for name in order], [token_steps[name] for name in order]
    )


def second_token_logprobs(variant: Variant, prompts: Sequence[list[int]]) -> list[dict[int, float]]:
    """Return the likeliest tokens and their logprobs of the first decode step after each prompt.

    The token before it is forced to be the prompt's last token again, so it is the same for every engine.
    """
    return second_token_logprobs_together([(variant, prompt) for prompt in prompts])


def second_token_logprobs_together(asked: Sequence[tuple[Variant, list[int]]]) -> list[dict[int, float]]:
    """Do the same for prompts of several variants of one engine, which differ only in their budgets."""
    variant = asked[0][0]
    variant.prepare()
    params = [
        SamplingParams(
            temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, logprobs=NUM_LIKELIEST,
            extra_args=one.extra_args, logit_bias={prompt[-1]: 100.0},
        )
        for one, prompt in asked
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": prompt} for _, prompt in asked]
    outputs = variant.llm.generate(prompts, params, use_tqdm=False)
    return [{t: lp.logprob for t, lp in output.outputs[0].logprobs[1].items()} for output in outputs]


def core(llm: LLM) -> Any:
    """Return the engine core of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core


def backbone(llm: LLM) -> Any:
    """Return the module with the routed layers of an in-process buddy engine."""
    return model_runner(llm).model.model


def _use_bypass(llm: LLM, wanted: bool) -> None:
    """Send rows that skip a layer through its bypass, or leave them unchanged as with an artifact without bypass."""
    model = backbone(llm)
    if not hasattr(model, "all_bypasses"):
        model.all_bypasses = model.bypasses
    model.bypasses = model.all_bypasses if wanted else None


def model_runner(llm: LLM) -> Any:
    """Return the model runner of an in-process engine."""
    return core(llm).model_executor.driver_worker.worker.model_runner
