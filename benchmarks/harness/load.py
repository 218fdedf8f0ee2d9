"""Sends load to a server and times it, with the code of `vllm bench serve`."""

import argparse
import asyncio
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.harness.rounds import Refused
from benchmarks.harness.servers import request_fields

LATENCIES = tuple(f"{p}_{name}_ms" for name in ("ttft", "tpot", "itl") for p in ("p50", "p99"))


@dataclass(frozen=True)
class Workload:
    """What requests look like. Lengths are in tokens. prefix: the part of the prompt that a run's requests share."""

    name: str
    prefix: int
    unique: int
    output: int

    @property
    def options(self) -> list[str]:
        """Options of `vllm bench serve`."""
        lengths = {"prefix-len": self.prefix, "input-len": self.unique, "output-len": self.output}
        return [part for key, value in lengths.items() for part in (f"--random-{key}", str(value))]


WORKLOADS = (Workload("unique", 0, 256, 64), Workload("shared prefix", 512, 64, 64))


@dataclass(frozen=True)
class Load:
    """How much is sent. rate: requests/s. seconds: of arrivals. burst: number of requests when all arrive at once."""

    workload: Workload
    rate: float
    seconds: float
    burst: int

    @property
    def num_requests(self) -> int:
        return self.burst if self.rate == float("inf") else max(8, round(self.rate * self.seconds))

    @property
    def row(self) -> dict[str, Any]:
        rate = "inf" if self.rate == float("inf") else self.rate
        return {"workload": self.workload.name, "rate": rate, "requests": self.num_requests}


def positive_number(text: str) -> float:
    """Parse an option that must be finite and above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return number


def arrival_rate(text: str) -> float:
    """Parse an option in requests/s; `inf` means all at once."""
    return float(text) if text == "inf" else positive_number(text)


def class_latencies(result: dict[str, Any], requests: range) -> dict[str, float]:
    """Return the LATENCIES of some requests of a run, as `vllm bench serve` defines them."""
    ttft = [result["ttfts"][i] for i in requests]
    itl = [gap for i in requests for gap in result["itls"][i]]
    tpot = [sum(result["itls"][i]) / (result["output_lens"][i] - 1) for i in requests]
    return {
        f"p{p}_{name}_ms": float(np.percentile(values, p)) * 1e3
        for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl))
        for p in (50, 99)
    }


def bench_serve(options: Sequence[str], budgets: Sequence[float]) -> dict[str, Any]:
    """Run `vllm bench serve` with these options and return its result. Request i has budgets[i % len(budgets)]."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    args = parser.parse_args(list(options))
    get_samples = serve.get_samples

    def with_budgets(*arguments: Any, **keywords: Any) -> list[Any]:
        requests = get_samples(*arguments, **keywords)
        for index, request in enumerate(requests):
            if budgets:
                request.request_overrides = request_fields(budgets[index % len(budgets)])
        return requests

    serve.get_samples = with_budgets
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            return asyncio.run(serve.main_async(args))
    except (ValueError, OSError) as error:
        raise Refused(f"vllm bench serve failed: {error}\n{said.getvalue()[-2000:]}") from None
    finally:
        serve.get_samples = get_samples
