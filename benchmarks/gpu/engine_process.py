"""Runs one engine in its own process, and reports what it computes and how long its decode steps take.

    python -m benchmarks.gpu.engine_process JOB      # JOB: an EngineJob as JSON; decode_steps.py starts it

It prints one JSON object a line. The output of vLLM goes to stderr.

The engine core runs in this process, where its scheduler and its model runner can be read. On a GPU it still schedules
asynchronously: a step is launched before the tokens of the previous step have arrived. In a server the front end is a
separate process. It has no part in the timed loop, which takes the core's outputs directly.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import numpy as np
from vllm import LLM, SamplingParams
from vllm_buddy_kernels import KERNELS

from benchmarks.gpu.drawn_weights import load_drawn_weights
from benchmarks.gpu.engine_job import (
    CHECKED_TOKENS,
    COMPARED,
    EAGER,
    NO_BYPASS,
    WARM_STEPS,
    EngineJob,
    check_prompts,
    draw_tokens,
    tokens_per_request,
    why_left_out,
    windows,
)
from benchmarks.harness.reference_check import NUM_LIKELIEST
from vllm_buddy.serving.plugin import register


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.engine_process",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", metavar="JOB", type=json.loads, help="fields of an EngineJob, as JSON")
    job = EngineJob(**parser.parse_args().job)
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to stdout
    for line in measure(job):
        print(json.dumps(line), file=lines, flush=True)


def measure(job: EngineJob) -> Iterator[dict[str, Any]]:
    """Yield the results, each with its `kind`."""
    started = time.perf_counter()
    engine = TimedEngine(job)
    yield {"kind": "engine", "start_s": time.perf_counter() - started, **engine.facts()}
    runs = []
    for batch, context in job.runs:
        if why := engine.why_left_out(batch, context):
            yield {"kind": "left out", "batch": batch, "context": context, "why": why}
        else:
            runs.append((batch, context))
    yield from _measure_budgets(engine, runs, job.budgets or [None], "", with_eager=job.has_bypass)
    if job.has_bypass:
        engine.drop_bypass()
        yield from _measure_budgets(engine, runs, [b for b in job.budgets if b < 1.0], NO_BYPASS, with_eager=False)


def _measure_budgets(
    engine: "TimedEngine", runs: Sequence[tuple[int, int]], budgets: Sequence[float | None], note: str, with_eager: bool
) -> Iterator[dict[str, Any]]:
    job = engine.job
    for batch in sorted({batch for batch, _ in runs}):
        prompts = check_prompts(job.vocab_size, batch, max(c for b, c in runs if b == batch))
        for budget in budgets:
            name = job.variant(budget) + note
            yield {"kind": "outputs", "variant": name, "batch": batch, "found": engine.outputs(budget, prompts)}
            if with_eager and budget is not None and budget < 1.0:
                with engine.eager():
                    found = engine.outputs(budget, prompts)
                yield {"kind": "outputs", "variant": name + EAGER, "batch": batch, "found": found}
    for batch, context in runs:
        for budget in budgets:
            step_ms, routing_share = engine.timed(budget, batch, context)
            line = {"variant": job.variant(budget) + note, "batch": batch, "context": context, "step_ms": step_ms}
            yield {"kind": "run", **line, "routing_share": None if budget is None else routing_share}


class TimedEngine:
    """An engine in this process whose decode steps can be timed."""

    def __init__(self, job: EngineJob) -> None:
        register()  # vllm_buddy need not be installed
        options: dict[str, Any] = {"skip_tokenizer_init": True, **job.options}
        if job.layers is not None:
            load_drawn_weights(job.layers)
            options["load_format"] = "dummy"
        if job.artifact is not None:
            options |= {"model_impl": "buddy", "additional_config": {"buddy": {"artifact": job.artifact}}}
        self.job = job
        # With a smaller max_num_seqs the largest batch would not run as one step; with a larger one vLLM would capture
        # graphs of sizes that are not timed.
        self.llm = LLM(job.model, max_num_seqs=max(batch for batch, _ in job.runs), **options)
        self.core: Any = self.llm.llm_engine.engine_core.engine_core
        self.runner: Any = self.core.model_executor.driver_worker.worker.model_runner
        self._rng = np.random.default_rng(0)

    def facts(self) -> dict[str, Any]:
        """Return settings that the figures depend on."""
        config = self.core.vllm_config
        return {
            "async_scheduling": bool(config.scheduler_config.async_scheduling),
            "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        }

    def decoded(self, batch: int, context: int) -> int:
        """Return the most tokens that a request of a run decodes."""
        per_step = self.core.vllm_config.scheduler_config.max_num_batched_tokens
        return tokens_per_request(self.job.timed_steps, batch, context, per_step)

    def why_left_out(self, batch: int, context: int) -> str | None:
        """Return why a run cannot be timed with this engine, or None if it can."""
        config = self.core.vllm_config
        return why_left_out(
            batch,
            context,
            self.decoded(batch, context),
            max_model_len=config.model_config.max_model_len,
            block_size=config.cache_config.block_size,
            num_blocks=config.cache_config.num_gpu_blocks,
        )

    def outputs(self, budget: float | None, prompts: Sequence[list[int]]) -> list[list[dict[int, float]]]:
        """Return [compared token][prompt] the likeliest tokens and their logprobs.

        All earlier tokens are forced to be the prompt's last token again.
        """
        self._drain()
        assert self.llm.reset_prefix_cache()  # otherwise a prompt seen before would not be computed again
        params = [
            self._params(budget, CHECKED_TOKENS, logprobs=NUM_LIKELIEST, logit_bias={prompt[-1]: 100.0})
            for prompt in prompts
        ]
        found = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [[_likeliest(output.outputs[0].logprobs[token]) for output in found] for token in COMPARED]

    def timed(self, budget: float | None, batch: int, context: int) -> tuple[list[float], list[float]]:
        """Return, for each repeat, the time of a step in ms and the share of it that routing took on the host."""
        engine, job = self.llm.llm_engine, self.job
        params = self._params(budget, self.decoded(batch, context))
        for index in range(batch):
            prompt = {"prompt_token_ids": draw_tokens(self._rng, job.vocab_size, context)}
            engine.add_request(f"{time.monotonic_ns()}-{index}", prompt, params)
        started: set[str] = set()
        stamps: list[tuple[float, float]] = []
        while len(stamps) < job.timed_steps:
            outputs = engine.engine_core.get_output().outputs
            started |= {output.request_id for output in outputs if output.new_token_ids}
            if any(output.finish_reason is not None for output in outputs):
                raise RuntimeError("a request ended before all of its steps were timed")
            if not outputs or len(started) < batch:  # nothing has arrived, or prompts are still being read
                continue
            if stamps and len(outputs) != batch:
                raise RuntimeError(f"a decode step had {len(outputs)} of {batch} requests")
            stamps.append((time.perf_counter(), self._routing_seconds()))
        engine.abort_request(list(engine.output_processor.request_states), internal=True)
        self._drain()
        seconds, routing_share = windows(stamps[WARM_STEPS :: job.steps])
        return [s / job.steps * 1e3 for s in seconds], routing_share

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run without graphs and with the reference of every kernel, while the block runs."""
        state, backbone = self.runner.buddy_state, self.runner.model.model
        kept = state.graphs, state.kernels, state._moves_rows, backbone.bypasses
        plain = KERNELS["reference"]
        state.graphs, state.kernels = None, plain
        if state._moves_rows is not None:
            state._moves_rows = plain
            backbone.bypasses = [bypass and replace(bypass, kernels=plain) for bypass in backbone.bypasses]
        try:
            yield
        finally:
            state.graphs, state.kernels, state._moves_rows, backbone.bypasses = kept

    def drop_bypass(self) -> None:
        """Leave rows that skip a layer unchanged from now on, as with an artifact without bypass."""
        state, backbone = self.runner.buddy_state, self.runner.model.model
        backbone.bypasses = None
        if state.graphs is not None:  # the bypasses are captured in them
            state.graphs = None
            gc.collect()
            state.capture_graphs(backbone)

    def _params(self, budget: float | None, max_tokens: int, **more: Any) -> SamplingParams:
        asked = None if budget is None else {"buddy_budget": budget}
        return SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=asked, **more
        )

    def _routing_seconds(self) -> float:
        """Return the seconds spent on router, plan and views so far."""
        if self.job.artifact is None:
            return 0.0
        return self.core.scheduler._metrics.routing_seconds + self.runner.buddy_state.view_seconds

    def _drain(self) -> None:
        """Step until no batch is in flight and the runner knows of every request that has ended."""
        while self.core.scheduler.has_requests() or self.core.batch_queue:
            self.llm.llm_engine.engine_core.get_output()


def _likeliest(logprobs: Any) -> dict[int, float]:
    """Return the likeliest tokens only: vLLM also returns the sampled token."""
    found = sorted(((lp.logprob, token) for token, lp in logprobs.items()), reverse=True)
    return {token: logprob for logprob, token in found[:NUM_LIKELIEST]}


if __name__ == "__main__":
    main()
