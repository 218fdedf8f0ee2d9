"""What the plugin keeps does not grow with the number of requests, however varied they are."""

import gc
import itertools
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vllm_buddy
from tests.harness.engine import Ask, Engine, Tiny, start_engine
from tests.harness.pretend_worker import PretendEngine
from tests.harness.shown_metrics import ShownMetrics
from tests.harness.tiny_models import VOCAB_SIZE
from vllm_buddy.method import PathSchedule
from vllm_buddy.method.path import path_mask
from vllm_buddy.serving.admission.latency import LatencyMeter

OURS = "vllm_buddy"
# One object or entry that stays of each request, or of every tenth, is more than this share of their number.
SHARE = 0.1
# Of a small numpy array, the least that stays of a request of which anything stays. In a process that has run other
# tests, some 5 KB of them were seen to stay after a thousand requests, of which 250 had one each.
LEAST_BYTES = 200


def kept() -> Counter[str]:
    """Objects of our classes by class, and entries of the containers that are their attributes."""
    gc.collect()
    found: Counter[str] = Counter()
    for one in gc.get_objects():
        kind = type(one)
        if not str(kind.__module__).startswith(OURS):
            continue
        found[kind.__qualname__] += 1
        for name, value in getattr(one, "__dict__", {}).items():
            if isinstance(value, (dict, list, set, deque, tuple)):
                found[f"{kind.__qualname__}.{name}"] += len(value)
    return found


def bytes_kept() -> Counter[str]:
    """Bytes that lines of this package have allocated and that are still held, by line."""
    path_mask.cache_clear()  # bounded by its size, which takes long to fill up
    gc.collect()
    folder = str(Path(vllm_buddy.__file__).parent)
    ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, f"{folder}/*")])
    return Counter({str(one.traceback): one.size for one in ours.statistics("lineno")})


def check_growth(serve: Callable[[int], None], num_requests: int, *, traces: bool = True) -> None:
    """Fail if something of ours stays of a tenth of num_requests requests, twice in a row.

    serve: serves a number of requests to the end. What is bounded may fill up in one round, but not go on growing.
    traces: whether memory is counted too, which makes Python several times slower.
    """
    serve(num_requests)
    if traces:
        tracemalloc.start()
    try:
        serve(num_requests // 3)
        counts, sizes = [kept()], [bytes_kept() if traces else Counter()]
        for _ in range(2):
            serve(num_requests)
            counts.append(kept())
            sizes.append(bytes_kept() if traces else Counter())
    finally:
        tracemalloc.stop()
    assert _growing(counts, SHARE * num_requests) == {}
    assert _growing(sizes, SHARE * num_requests * LEAST_BYTES) == {}


def _growing(found: list[Counter[str]], most: float) -> dict[str, int]:
    """What grew by more than `most` from each count to the next, and by how much at least."""
    least = {name: min(after[name] - before[name] for before, after in pairwise(found)) for name in found[-1]}
    return {name: grown for name, grown in least.items() if grown > most}


def draw(rng: np.random.Generator, number: int, *, most_tokens: int) -> Ask:
    """A request like no other: its prompt, budget or price, and options."""
    prompt = tuple(rng.integers(0, VOCAB_SIZE, rng.integers(1, most_tokens)).tolist())
    budget: Any = "auto" if number % 4 == 0 else float(rng.uniform(0.375, 1.0))
    options: dict[str, Any] = {"buddy_paths": 1} if number % 5 == 0 else {}
    if number % 3 == 0:
        options["buddy_prompt"] = "full"
    if number % 8 == 0:
        options["buddy_price"] = float(rng.uniform(0, 30))
    return Ask(prompt, budget, int(rng.integers(1, 10)), options=options)


def hurry(scheduler: Any) -> None:
    """Let a second pass at each look at the clock of the latencies, so that their window of 30 s is always full."""
    if scheduler._auto.meter is not None:
        scheduler._auto.meter = LatencyMeter(itertools.count(time.perf_counter()).__next__)


SLO = {"slo": {"itl_ms": 1000, "ttft_ms": 10000}}
LOAD = {"load": {"price": 40.0, "running": [2, 6]}}


@pytest.mark.parametrize(
    ("buddy", "asynchronous"),
    [(SLO, False), (LOAD, True), ({"kv_layout": "units"}, False)],
    ids=("objectives", "load, asynchronous", "units"),
)
def test_the_scheduler_and_the_metrics_forget_requests(
    tiny: Callable[[str], Tiny], buddy: dict[str, Any], asynchronous: bool
) -> None:
    """Fails if a server that runs for weeks fills its memory with requests, paths, salts, labels or latencies."""
    from vllm.v1.request import RequestStatus

    engine = PretendEngine(
        tiny("llama"), PathSchedule(1), asynchronous=asynchronous, num_blocks=90, chunk=64, buddy=buddy
    )
    engine._execute = _unchecked(engine)  # type: ignore[method-assign]
    hurry(engine.scheduler)
    shown = ShownMetrics(engine.config)
    rng = np.random.default_rng(5)

    def serve(num_requests: int) -> None:
        for number in range(num_requests):
            request_id = engine.add(draw(rng, number, most_tokens=80), Ask((1,)))
            if number % 7 == 0:
                engine.step()
                engine.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
            engine.step()
        while not engine.idle:
            engine.step()
        shown.take(engine)
        for records in (engine._routes, engine.generated, engine.told):
            records.clear()

    check_growth(serve, 1000)


def _unchecked(engine: PretendEngine) -> Callable[[Any], Any]:
    """A worker that samples a token at the end of what is known of each request, and compares nothing."""
    from vllm.v1.outputs import ModelRunnerOutput

    rng = np.random.default_rng(6)

    def execute(output: Any) -> ModelRunnerOutput:
        for request_id in output.finished_req_ids:
            engine._rows.pop(request_id, None)
        computed = engine._take_in(output)
        sampled = {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            tokens = engine._rows[request_id].tokens
            is_last = computed[request_id] + num_tokens == len(tokens)
            sampled[request_id] = [int(rng.integers(VOCAB_SIZE))] if is_last else []
            tokens += sampled[request_id]
        index = {request_id: i for i, request_id in enumerate(sampled)}
        return ModelRunnerOutput(req_ids=list(sampled), req_id_to_index=index, sampled_token_ids=list(sampled.values()))

    return execute


@pytest.mark.slow
@pytest.mark.parametrize(
    ("buddy", "options"),
    [
        ({"kv_policy": "masked", **SLO}, {"num_gpu_blocks_override": 40}),
        ({"kv_policy": "masked", "kv_layout": "units"}, {}),
        ({"schedule": {"prefill": "token", "decode": "token"}, **LOAD}, {}),
    ],
    ids=("masked, few blocks", "units", "depths per token"),
)
def test_an_engine_forgets_requests(
    tiny: Callable[[str], Tiny], buddy: dict[str, Any], options: dict[str, Any]
) -> None:
    """Fails if the worker, or the front end, keeps something of each request that has ended."""
    engine = start_engine(tiny("llama"), buddy=buddy, disable_log_stats=False, **options)
    hurry(engine.scheduler)
    rng = np.random.default_rng(5)

    def serve(num_requests: int) -> None:
        for number in range(num_requests):
            ask = draw(rng, number, most_tokens=40)
            if number % 10 == 1:
                ask = Ask(ask.prompt, ask.budget, ask.max_tokens, {"n": 2, "temperature": 1.0}, options=ask.options)
            request_id = engine.add(ask, cache_salt=f"salt {rng.integers(1 << 40)}" if number % 2 else None)
            if number % 7 == 0:
                engine.abort(request_id)
            engine.step()
            if number % 6 == 0:
                engine.abort(request_id)
        engine.finish()
        engine.step()  # tells the worker which requests have finished
        assert not engine.scheduler._routed

    check_growth(serve, 150, traces=False)


def test_what_would_stay_is_found(llama: Engine) -> None:
    """Fails if the counts above do not see an object, an entry or memory that is kept of every request."""
    number = 300
    leaked: list[Any] = []

    def leak(num_requests: int) -> None:
        leaked.extend(llama.scheduler._routes.route(0.5, (1, 2, 3), 3, None) for _ in range(num_requests))

    with pytest.raises(AssertionError, match="RequestRoute"):
        check_growth(leak, number)
    leaked.clear()
    llama.state.policy.leak = []
    try:
        with pytest.raises(AssertionError, match=r"Masked\.leak"):
            check_growth(lambda num_requests: llama.state.policy.leak.extend(range(num_requests)), number)
    finally:
        del llama.state.policy.leak
