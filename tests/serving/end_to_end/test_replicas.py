"""Data-parallel replicas over HTTP: each budget on its own, with the reference's tokens."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness.engine import Ask, Tiny
from tests.harness.http_server import NUM_TOKENS, PROMPTS, SCHEDULE, Server, budget, serving

BUDGETS = (0.5, 1.0)
NUM_OF_EACH = 12
SETTLE_S = 10.0


@pytest.mark.slow
def test_budgets_run_on_replicas_of_their_own(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Fails if replicas answer otherwise than one engine, mix budgets, or do not tell their metrics apart."""
    options = ("--data-parallel-size", "2", "--data-parallel-size-local", "2")
    log_path = tmp_path / "log"
    with serving(lambda log: Server(tiny("llama"), log, options, VLLM_CPU_OMP_THREADS_BIND="0|1"), log_path) as server:
        for asked in BUDGETS * 4:  # until both budgets have a home
            server.complete(PROMPTS[0], budget(str(asked)))
        before = [finished(server, engine) for engine in (0, 1)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda b: server.complete(PROMPTS[1], budget(str(b))), BUDGETS * NUM_OF_EACH))
        for asked, (status, answer) in zip(BUDGETS * NUM_OF_EACH, answers):
            expected = tiny("llama").expected(Ask(PROMPTS[1], asked, NUM_TOKENS), "masked", SCHEDULE)
            assert status == 200
            assert answer["choices"][0]["token_ids"] == expected.token_ids
        wanted = [(NUM_OF_EACH, NUM_OF_EACH * asked) for asked in BUDGETS]
        deadline = time.monotonic() + SETTLE_S
        while (after := [finished(server, engine) for engine in (0, 1)]) and time.monotonic() < deadline:
            ran = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(after, before)]
            if ran == wanted:
                break
            time.sleep(0.2)
        assert ran == wanted


def finished(server: Server, engine: int) -> tuple[float, float]:
    """The finished requests of an engine, and the sum of their budgets."""
    metrics = server.metrics(engine)
    return metrics.get("vllm_buddy:budget_count", 0.0), metrics.get("vllm_buddy:budget_sum", 0.0)
