"""Measures two data-parallel replicas with budget affinity and without: does it pay to keep budgets apart?

    python -m benchmarks.speed.replicas            # SmolLM2-135M, CPU, about 15 minutes on 2 cores

Two servers stay up, each with two replicas: with affinity, and with `affinity.enabled: false`, where vLLM balances by
load alone. Users send requests one after the other, so that the number in flight is constant. Half of the users ask for
budget 1.0 and half for 0.5 (*mixed*), or all for one of them. Output tokens are counted as they arrive, for
`--seconds`, after a warm-up. Servers and traffics take turns within a round, and ratios are taken within it:

    gain         tokens/s with affinity over tokens/s without, of the same traffic
    predicted    (1 + r) / 2 of the mixed traffic, r = tokens/s without affinity, all at 0.5, over all at 1.0

The prediction is the union model's: without affinity each step of mixed traffic costs a step at 1.0; with it half of
the users get steps at 0.5. It is an upper bound where a row that skips a layer also saves time, as on CPU. With traffic
of one budget the gain should be 1.

The benchmark refuses to show figures if a server dies, a request fails, or outputs differ from the reference's.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.harness.load import positive_number
from benchmarks.harness.reference_check import served_routings
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, at_least
from benchmarks.harness.servers import SERVED_NAME, request_fields
from benchmarks.speed.serving import Served, check, open_server
from vllm_buddy.artifact import SHIPPED_DIR, Artifact, load_artifact
from vllm_buddy.cli.server_process import HOST
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

BUDGETS = (1.0, 0.5)
MIXED = "mixed"
TRAFFIC: dict[str, tuple[float, ...]] = {MIXED: BUDGETS, **{str(budget): (budget,) for budget in BUDGETS}}
WITH, WITHOUT = "affinity", "by load alone"
NUM_REPLICAS = 2
PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 5)
    parser.add_argument("--users", type=at_least(2), default=32, help="requests in flight; default: 32")
    parser.add_argument("--tokens", type=at_least(2), default=64, help="output tokens of a request; default: 64")
    parser.add_argument("--seconds", type=positive_number, default=20.0, help="that are counted; default: 20")
    parser.add_argument("--warm-up", type=positive_number, default=15.0, help="seconds before; default: 15")
    parser.add_argument("--model", type=Path, help="folder of a model; default: the embedded one")
    parser.add_argument("--artifact", type=Path, default=SHIPPED_DIR / DEFAULT_MODEL, help="default: the shipped one")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_replicas.jsonl")
    args = parser.parse_args()
    env = environment()
    rows = measure(args.model or fetch(report=print), args.artifact, args)
    report(args.out, rows, env)


def measure(model: Path, artifact_dir: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start and check the servers, run all traffics in all rounds, and return one row per figure.

    args: rounds, users, tokens, seconds, warm_up.
    """
    artifact = load_artifact(artifact_dir)
    rounds = Rounds(args.rounds)
    with (
        tempfile.TemporaryDirectory(prefix="vllm_buddy-replicas-") as work,
        open_servers(model, artifact, artifact_dir, Path(work)) as variants,
    ):
        check(variants, model, artifact)
        rounds.mark_checked(run_name(served.name, traffic) for served in variants for traffic in TRAFFIC)
        runs = [(served, traffic) for traffic in TRAFFIC for served in variants]
        for index in range(args.rounds):
            # Both servers run a traffic one after the other; which of them is first changes from round to round.
            for served, traffic in runs[:: 1 if index % 2 == 0 else -1]:
                prompts = np.random.default_rng((index, len(traffic)))
                tokens_per_s = run(served, TRAFFIC[traffic], prompts, artifact.config.base_model.vocab_size, args)
                rounds.add(index, run_name(served.name, traffic), tokens_per_s=sum(tokens_per_s.values()))
                for budget, figure in tokens_per_s.items():
                    rounds.add(index, run_name(served.name, traffic), **{f"tokens_per_s at {budget}": figure})
            print(f"round {index + 1} of {args.rounds} done", flush=True)
    return result_rows(rounds, args.users)


@contextmanager
def open_servers(model: Path, artifact: Artifact, artifact_dir: Path, work: Path) -> Iterator[list[Served]]:
    """Yield both servers, running."""
    if device() == "cpu" and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        cores = np.array_split(sorted(os.sched_getaffinity(0)), NUM_REPLICAS)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, of)) for of in cores)
    routings = served_routings(artifact, BUDGETS)
    with ExitStack() as stack:
        variants = []
        for name, enabled in ((WITH, True), (WITHOUT, False)):
            settings = {"buddy": {"artifact": str(artifact_dir), "affinity": {"enabled": enabled}}}
            options = ["--data-parallel-size", str(NUM_REPLICAS), "--api-server-count", "1"]
            options += ["--additional-config", json.dumps(settings)]
            server = open_server(stack, name, model, work, *options)
            variants.append(Served(name, server, BUDGETS, routings))
        yield variants


def run(
    served: Served, budgets: Sequence[float], prompts: np.random.Generator, vocab_size: int, args: argparse.Namespace
) -> dict[float, float]:
    """Let users ask for a while; returns output tokens/s by budget.

    Raises:
        Refused: the server died, or a request failed.
    """
    served.server.check_alive()
    served.server.reset_prefix_cache()
    try:
        counted = asyncio.run(_users(served.server.process.port, budgets, prompts, vocab_size, args))
    except (aiohttp.ClientError, ValueError) as error:
        served.server.check_alive()
        raise Refused(f"'{served.name}': a request failed: {error}; nothing is said about it") from None
    return {budget: tokens / args.seconds for budget, tokens in counted.items()}


async def _users(
    port: int, budgets: Sequence[float], prompts: np.random.Generator, vocab_size: int, args: argparse.Namespace
) -> dict[float, int]:
    """The tokens that arrived while they counted, by budget."""
    counted = dict.fromkeys(budgets, 0)
    start = time.monotonic() + args.warm_up
    end = start + args.seconds

    async def user(session: aiohttp.ClientSession, budget: float) -> None:
        while True:
            prompt = prompts.integers(vocab_size // 10, vocab_size, PROMPT_TOKENS).tolist()
            body = {
                "model": SERVED_NAME,
                "prompt": prompt,
                "max_tokens": args.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
                **request_fields(budget),
            }
            async with session.post("/v1/completions", json=body) as response:
                if response.status != 200:
                    raise ValueError(f"{response.status} {await response.text()}")
                async for line in response.content:
                    if line.startswith(b"data: {") and start <= time.monotonic() < end:
                        counted[budget] += len(json.loads(line[6:])["choices"][0]["token_ids"])

    connector = aiohttp.TCPConnector(limit=args.users)
    async with aiohttp.ClientSession(f"http://{HOST}:{port}", connector=connector) as session:
        users = [asyncio.create_task(user(session, budgets[i % len(budgets)])) for i in range(args.users)]
        failed, _ = await asyncio.wait(users, timeout=end - time.monotonic(), return_when=asyncio.FIRST_EXCEPTION)
        for task in users:
            task.cancel()
        await asyncio.gather(*users, return_exceptions=True)
        for task in failed:
            task.result()
    return counted


def result_rows(rounds: Rounds, users: int) -> list[dict[str, Any]]:
    """Return one row per figure."""
    rows = []
    for traffic, budgets in TRAFFIC.items():
        about = {"traffic": traffic, "users": users, "replicas": NUM_REPLICAS}
        metrics = ["tokens_per_s"]
        metrics += [f"tokens_per_s at {budget}" for budget in budgets] if len(budgets) > 1 else []
        for metric in metrics:
            for variant in (WITH, WITHOUT):
                values = rounds.values(metric, run_name(variant, traffic))
                rows.append(rounds.row(metric, values, variant=variant, **about))
            gain = rounds.ratio(metric, run_name(WITH, traffic), run_name(WITHOUT, traffic))
            rows.append(rounds.row(metric.replace("tokens_per_s", "gain"), gain, variant=WITH, **about))
        if traffic == MIXED:
            full, half = (run_name(WITHOUT, str(budget)) for budget in BUDGETS)
            predicted = (1 + rounds.ratio("tokens_per_s", half, full)) / 2
            rows.append(rounds.row("predicted_gain", predicted, variant=WITH, **about))
    return rows


def run_name(variant: str, traffic: str) -> str:
    return f"{variant}, {traffic}"


if __name__ == "__main__":
    main()
