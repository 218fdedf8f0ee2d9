"""Measures how long a server takes from its command line until it answers, buddy beside stock vLLM.

    python -m benchmarks.speed.start            # SmolLM2-135M, CPU, about 6 minutes on 2 cores

Each round starts both servers one after the other, each twice: with empty caches of compiled code (cold), as after an
installation, and with what the first start left there (warm). Stock vLLM is its own module, with the plugin switched
off. Every server must answer a prompt at full depth like stock vLLM.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import httpx

from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, in_turn
from vllm_buddy.cli.server_process import HOST, ServerProcess
from vllm_buddy.models.embedded import fetch
from vllm_buddy.serving.plugin import DISABLE_VARIABLE

PROMPT = "The capital of France is"
NUM_TOKENS = 16
START_TIMEOUT_S = 600.0
# Of each server: what it starts with, and its environment.
SERVERS: dict[str, tuple[Sequence[str], dict[str, str]]] = {
    "stock": ((sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"), {DISABLE_VARIABLE: "1"}),
    "buddy": ((sys.executable, "-m", "vllm_buddy", "serve"), {}),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.start",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rounds_option(parser, 2)
    parser.add_argument("--model", type=Path, help="model folder; default: the embedded model")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_start.jsonl")
    args = parser.parse_args()
    env = environment()
    model = args.model or fetch(report=print)
    rounds, answers = Rounds(args.rounds), {}
    for index in range(args.rounds):
        for name in in_turn(list(SERVERS), index):
            with empty_caches() as folder:
                for cache in ("cold", "warm"):
                    variant = f"{name}, {cache}"
                    seconds, answers[variant] = start(name, model, folder)
                    rounds.add(index, variant, start_s=seconds)
    check(answers)
    rounds.mark_checked(answers)
    rows = []
    for cache in ("cold", "warm"):
        for name in SERVERS:
            variant = f"{name}, {cache}"
            about = {"variant": name, "cache": cache}
            rows.append(rounds.row("start_s", rounds.values("start_s", variant), **about))
            ratio = rounds.ratio("start_s", variant, f"stock, {cache}")
            rows.append(rounds.row("start_over_stock", ratio, **about))
    report(args.out, rows, env)
    return 0


def start(name: str, model: Path, folder: Path) -> tuple[float, str]:
    """Start a server and stop it again; returns the seconds until it was healthy, and its answer to PROMPT."""
    program, variables = SERVERS[name]
    arguments = [str(model), "--served-model-name", "model"]
    arguments += ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(1 << 29)]
    log = folder / f"{name}.log"
    with patch.dict(os.environ, variables), ServerProcess(arguments, log, START_TIMEOUT_S, program) as server:
        server.wait_until_healthy(lambda *_: None)
        body = {"model": "model", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        reply = httpx.post(f"http://{HOST}:{server.port}/v1/completions", json=body, timeout=60, trust_env=False)
        reply.raise_for_status()
        return server.start_s, reply.json()["choices"][0]["text"]


def check(answers: dict[str, str]) -> None:
    """Raise Refused unless all servers gave the same answer."""
    if len(set(answers.values())) > 1:
        raise Refused(f"at full depth the servers answer differently: {answers}")


@contextmanager
def empty_caches() -> Iterator[Path]:
    """Let servers find and leave compiled code in a new folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="vllm_buddy-start-") as folder:
        caches = {"VLLM_CACHE_ROOT": f"{folder}/vllm", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
        with patch.dict(os.environ, caches):
            yield Path(folder)


if __name__ == "__main__":
    sys.exit(main())
