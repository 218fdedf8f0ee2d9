"""The figures of two replicas, and the users that they are measured with."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest
from aiohttp import web

pytest.importorskip("vllm")
from benchmarks.harness.rounds import Rounds
from benchmarks.speed.replicas import MIXED, TRAFFIC, WITH, WITHOUT, _users, result_rows, run_name


def test_gain_and_prediction_compare_what_they_say() -> None:
    """Fails if a ratio is upside down, or the prediction comes from the servers with affinity."""
    rounds = Rounds(1)
    rounds.mark_checked(run_name(variant, traffic) for variant in (WITH, WITHOUT) for traffic in TRAFFIC)
    figures = {(WITH, "1.0"): 99.0, (WITHOUT, "1.0"): 100.0, (WITH, "0.5"): 170.0, (WITHOUT, "0.5"): 160.0}
    for (variant, traffic), figure in figures.items():
        rounds.add(0, run_name(variant, traffic), tokens_per_s=figure)
    for variant, full, half in ((WITH, 50.0, 80.0), (WITHOUT, 52.0, 52.0)):
        by_budget = {"tokens_per_s at 1.0": full, "tokens_per_s at 0.5": half}
        rounds.add(0, run_name(variant, MIXED), tokens_per_s=full + half, **by_budget)
    found = {(row["traffic"], row["metric"]): row["p50"] for row in result_rows(rounds, 8) if "gain" in row["metric"]}
    assert found == {
        (MIXED, "gain"): 1.25,
        (MIXED, "gain at 1.0"): pytest.approx(50 / 52, abs=1e-3),
        (MIXED, "gain at 0.5"): pytest.approx(80 / 52, abs=1e-3),
        (MIXED, "predicted_gain"): 1.3,
        ("1.0", "gain"): 0.99,
        ("0.5", "gain"): pytest.approx(170 / 160, abs=1e-3),
    }


def counted(status: int = 200) -> dict[float, int]:
    """What two users count at a server that sends two tokens in each chunk."""
    in_flight: dict[float, int] = {}
    asked = SimpleNamespace(users=4, tokens=6, warm_up=0.2, seconds=2.0)

    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        budget = body["vllm_xargs"]["buddy_budget"]
        in_flight[budget] = in_flight.get(budget, 0) + 1
        assert in_flight[budget] <= asked.users / 2
        assert len(body["prompt"]) == 64
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for _ in range(body["max_tokens"] // 2):
            await response.write(f"data: {json.dumps({'choices': [{'token_ids': [1, 2]}]})}\n\n".encode())
            await asyncio.sleep(0.01)
        await response.write(b"data: [DONE]\n\n")
        in_flight[budget] -= 1
        return response

    async def serve() -> dict[float, int]:
        app = web.Application()
        app.router.add_post("/v1/completions", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        try:
            return await _users(port, (1.0, 0.5), np.random.default_rng(0), 1000, asked)  # type: ignore[arg-type]
        finally:
            await runner.cleanup()

    return asyncio.run(serve())


def test_users_count_tokens_by_budget() -> None:
    """Fails if users wait for each other, mix their budgets or miss tokens."""
    found = counted()
    assert set(found) == {1.0, 0.5}
    assert all(tokens > 0 and tokens % 2 == 0 for tokens in found.values())


def test_a_request_that_fails_ends_the_run() -> None:
    """Fails if figures are shown of a server that refuses requests."""
    with pytest.raises(ValueError, match="500"):
        counted(status=500)
