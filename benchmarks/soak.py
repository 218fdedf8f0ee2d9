"""Lets a server run under random traffic for half an hour, kills it on the way, and checks every answer afterwards.

    python -m benchmarks.soak                    # SmolLM2-135M, CPU, 30 minutes and then the checks
    python -m benchmarks.soak --minutes 2        # the short form

Requests arrive as a Poisson process: prompts of 8 to 256 tokens, of which a third begin with one of three shared
passages, 1 to 64 tokens to decode, budgets 1.0, 0.875, 0.75, 0.5 and "auto", some with the prompt at full depth, some
streamed; of the streamed ones every third client goes away after a few tokens. The KV cache is too small for the
requests that run together, so that vLLM preempts some. At half time the engine's process is killed with SIGKILL. A
supervisor starts the server again, and the traffic goes on.

Afterwards every completed request is sent again, alone, with nothing in the prefix cache. In float32 its tokens must be
the same; where they part between two tokens whose log-probabilities lie less than 1e-3 apart, it counts as a tie.

Before the traffic, each life of the server gets one prompt of every length up to a step's tokens, at full depth. The
matrix products of vLLM on CPU (oneDNN) keep code for each number of rows that a layer has had, up to 128 of them: some
140 MB for SmolLM2-135M, which would else be taken bit by bit, as the traffic brings those numbers. The prompts also
touch every block of the KV cache, which takes memory when it is first written.

Rows: requests by what became of them, preemptions, tokens found in the prefix cache, wrong answers and ties, and the
growth of the memory of the server's processes, from the second fifth of each life of the server to the last: as a share
of the memory of all, and in MiB for each.
"""

import argparse
import queue
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness.load import positive_number
from benchmarks.harness.real_prompts import passages
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, write_rows
from benchmarks.harness.rounds import Refused
from tools.features.client import Client
from tools.features.servers import client, server
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch
from vllm_buddy.models.folder import load_tokenizer

BUDGETS: tuple[float | str, ...] = (1.0, 0.875, 0.75, 0.5, "auto")
PROMPT_TOKENS, SHARED_TOKENS, NUM_SHARED, DECODED_TOKENS = (8, 256), 96, 3, (1, 64)
SHARE_SHARED, SHARE_FULL_PROMPT, SHARE_STREAMED, SHARE_LEAVING = 1 / 3, 1 / 5, 1 / 2, 1 / 3
# A float32 token of SmolLM2 takes 45 KiB: about 900 fit, and 16 requests of 160 tokens in the mean want 2,600.
ARGUMENTS = ("--kv-cache-memory-bytes", "42M", "--block-size", "32")
TIE = 1e-3
STEP_TOKENS = 128  # --max-num-batched-tokens of tools/features/servers.py
SAMPLE_MEMORY_S = 2.0
LEAST_SAMPLES = 20  # of memory in a life of the server, below which nothing is said about its growth


@dataclass
class Request:
    """A request and what became of it: "completed", "left" (the client went away) or "lost" (the server died)."""

    prompt: list[int]
    num_tokens: int
    budget: float | str
    options: dict[str, Any]
    streamed: bool
    leaves_after: int | None
    became: str = ""
    token_ids: list[int] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=positive_number, default=30, help="of traffic; default: 30")
    parser.add_argument("--rate", type=positive_number, default=1.0, help="requests/s; default: 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("results/soak"), help="folder of the server's logs")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_soak.jsonl")
    args = parser.parse_args()
    env = environment()
    model = fetch(report=print)
    text = load_tokenizer(model)("\n\n".join(passages()), add_special_tokens=False, verbose=False)["input_ids"]
    requests = draw(text, args.minutes * 60, args.rate, random.Random(args.seed))
    with Supervisor(model, text, args.log) as supervisor:
        send(requests, supervisor)
        supervisor.finish_life()
        verdicts = check([request for _, request in requests if request.became == "completed"], supervisor)
    rows = rows_of([request for _, request in requests], supervisor, verdicts)
    rows = [{**row, "minutes": args.minutes, "rate": args.rate} for row in rows]
    write_rows(args.out, rows, env)
    for row in rows:
        print(f"{row['metric']:24} {row['value']}")
    return 1 if verdicts["wrong"] else 0


def draw(text: Sequence[int], seconds: float, rate: float, rng: random.Random) -> list[tuple[float, Request]]:
    """Draw all requests, each with the second at which it is sent."""
    found = []
    shared = [_passage(text, SHARED_TOKENS, rng) for _ in range(NUM_SHARED)]
    at = rng.expovariate(rate)
    while at < seconds:
        prompt = _passage(text, rng.randint(*PROMPT_TOKENS), rng)
        if rng.random() < SHARE_SHARED:
            prompt = rng.choice(shared) + prompt
        options = {"buddy_prompt": "full"} if rng.random() < SHARE_FULL_PROMPT else {}
        streamed = rng.random() < SHARE_STREAMED
        leaves = rng.randint(1, 8) if streamed and rng.random() < SHARE_LEAVING else None
        budget = rng.choice(BUDGETS)
        found.append((at, Request(prompt, rng.randint(*DECODED_TOKENS), budget, options, streamed, leaves)))
        at += rng.expovariate(rate)
    return found


def _passage(text: Sequence[int], num_tokens: int, rng: random.Random) -> list[int]:
    start = rng.randrange(len(text) - num_tokens)
    return list(text[start : start + num_tokens])


class Supervisor:
    """Keeps a server running, and measures the memory of its processes.

    text: tokens to warm up with. memory: bytes by process over time, a list for each life. counted: vLLM's counters
    over all lives.
    """

    def __init__(self, model: Path, text: Sequence[int], log: Path) -> None:
        self._model, self._text, self._log = model, text, log
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self.memory: list[list[Counter[str]]] = []
        self.counted: Counter[str] = Counter()
        self.client: Client

    def __enter__(self) -> "Supervisor":
        self._start()
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._sampler.join()
        self._context.__exit__(None, None, None)

    def _start(self) -> None:
        log = self._log / f"server-{len(self.memory)}.log"
        self._context = server(self._model, log, artifact=DEFAULT_MODEL, arguments=ARGUMENTS)
        process = self._context.__enter__()
        self._parent = psutil.Process(process.pid)
        self.client = client(process, self._model, 1.0)
        for length in range(1, STEP_TOKENS + 1):
            self.client.complete(list(self._text[length : 2 * length]), tells=False, max_tokens=1, cache_salt="warm-up")
        self.memory.append([])

    def kill(self) -> None:
        """Kill the process of the engine with SIGKILL."""
        self._count()
        engine = next(p for p in self._processes() if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline()))
        engine.send_signal(signal.SIGKILL)

    def restart(self) -> None:
        """Start the server again."""
        self._context.__exit__(None, None, None)
        self._start()

    def finish_life(self) -> None:
        """Wait until nothing runs, and count.

        Raises:
            Refused: a request hangs, or blocks of the KV cache are lost.
        """
        try:
            self.client.wait_idle()
        except AssertionError as error:
            raise Refused(f"the server does not come to rest: {error}") from None
        self._count()
        self._stopped.set()

    def _count(self) -> None:
        for name in ("num_preemptions", "prefix_cache_queries", "prefix_cache_hits"):
            self.counted[name] += round(self.client.metric(f"vllm:{name}_total"))

    def _processes(self) -> list[psutil.Process]:
        return [self._parent, *self._parent.children(recursive=True)]

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_MEMORY_S):
            try:
                sample: Counter[str] = Counter()
                for process in self._processes():
                    name = "front end" if process == self._parent else process.name()
                    sample[name] += process.memory_info().rss
                self.memory[-1].append(sample)
            except psutil.NoSuchProcess:  # it is being restarted
                continue


def send(requests: Sequence[tuple[float, Request]], supervisor: Supervisor) -> None:
    """Send all requests at their times; kill and restart the server in the middle, during which time stands still.

    Raises:
        Refused: a request fails that was not in flight when the server was killed.
    """
    threads: list[threading.Thread] = []
    problems: queue.Queue[str] = queue.Queue()
    killed = threading.Event()

    def run(request: Request, to: Client) -> None:
        try:
            _ask(request, to)
        except Exception as error:
            request.became = "lost"
            if not killed.is_set():
                problems.put(f"{type(error).__name__}: {error}")

    started = time.monotonic()
    for number, (at, request) in enumerate(requests):
        if number == len(requests) // 2:
            began = time.monotonic()
            killed.set()
            supervisor.kill()
            for thread in threads:
                thread.join()
            supervisor.restart()
            killed.clear()
            started += time.monotonic() - began
        time.sleep(max(0.0, started + at - time.monotonic()))
        if not problems.empty():
            raise Refused(f"a request failed: {problems.get()}")
        threads.append(threading.Thread(target=run, args=(request, supervisor.client)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    if not problems.empty():
        raise Refused(f"a request failed: {problems.get()}")


def _ask(request: Request, to: Client) -> None:
    to = to.at(request.budget)
    body: dict[str, Any] = {"max_tokens": request.num_tokens, "ignore_eos": True, "vllm_xargs": request.options}
    if not request.streamed:
        answer = to.complete(request.prompt, tells=False, **body)
        request.token_ids = answer["choices"][0]["token_ids"]
    else:
        chunks = to.stream("/v1/completions", prompt=request.prompt, return_token_ids=True, **body)
        for chunk in chunks:
            if chunk["choices"]:
                request.token_ids += chunk["choices"][0]["token_ids"] or []
            if request.leaves_after is not None and len(request.token_ids) >= request.leaves_after:
                chunks.close()  # type: ignore[attr-defined]
                request.became = "left"
                return
    if len(request.token_ids) != request.num_tokens:
        raise ValueError(f"{len(request.token_ids)} of {request.num_tokens} tokens came")
    request.became = "completed"


def check(completed: Sequence[Request], supervisor: Supervisor) -> Counter[str]:
    """Send every request again, alone; returns how many answers were "same", a "tie", or "wrong"."""
    verdicts: Counter[str] = Counter()
    for number, request in enumerate(completed):
        alone = supervisor.client.at(request.budget).complete(
            request.prompt,
            tells=False,
            max_tokens=request.num_tokens,
            ignore_eos=True,
            vllm_xargs=request.options,
            cache_salt=f"alone {number}",
            logprobs=2,
            return_tokens_as_token_ids=True,
        )
        choice = alone["choices"][0]
        verdicts[verdict(request.token_ids, choice["token_ids"], choice["logprobs"]["top_logprobs"])] += 1
        if number % 100 == 99:
            print(f"{number + 1} of {len(completed)} checked: {dict(verdicts)}", flush=True)
    return verdicts


def verdict(found: Sequence[int], alone: Sequence[int], likeliest: Sequence[dict[str, float]]) -> str:
    """Compare an answer with that of the same request alone.

    likeliest: for each token of `alone`, the two likeliest ones with their log-probabilities, as vLLM names them.
    """
    parted = next((i for i, (a, b) in enumerate(zip(found, alone, strict=True)) if a != b), None)
    if parted is None:
        return "same"
    there = likeliest[parted]
    other = there.get(f"token_id:{found[parted]}")
    return "tie" if other is not None and max(there.values()) - other < TIE else "wrong"


def growth(samples: Sequence[Mapping[str, int]]) -> dict[str, float] | None:
    """Growth of memory in one life of the server, from its second fifth to its last; None if it was too short.

    By process, in MiB, and of all of them as a share, "all".
    """
    if len(samples) < LEAST_SAMPLES:
        return None
    fifth = len(samples) // 5

    def parts(sizes: Sequence[int]) -> tuple[float, float]:
        return float(np.median(sizes[fifth : 2 * fifth])), float(np.median(sizes[-fifth:]))

    before, after = parts([sum(sample.values()) for sample in samples])
    grown = {"all": round(after / before - 1, 4)}
    for name in sorted(set().union(*samples)):
        before, after = parts([sample.get(name, 0) for sample in samples])
        grown[name] = round((after - before) / 2**20, 1)
    return grown


def rows_of(requests: Sequence[Request], supervisor: Supervisor, verdicts: Counter[str]) -> list[dict[str, Any]]:
    """One row per figure."""
    became = Counter(request.became for request in requests)
    counted = supervisor.counted
    values: dict[str, Any] = {name: became[name] for name in ("completed", "left", "lost")}
    values |= {"preemptions": counted["num_preemptions"]}
    values |= {"hit_rate": round(counted["prefix_cache_hits"] / max(1, counted["prefix_cache_queries"]), 3)}
    values |= {f"answers_{name}": verdicts[name] for name in ("same", "tie", "wrong")}
    lives = [found for samples in supervisor.memory if (found := growth(samples)) is not None]
    values |= {"memory_growth": [found.pop("all") for found in lives], "memory_growth_mib": lives}
    return [{"metric": name, "value": value} for name, value in values.items()]


if __name__ == "__main__":
    sys.exit(main())
