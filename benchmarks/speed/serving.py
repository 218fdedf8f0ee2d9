"""Measures servers under arriving requests: stock vLLM, stock vLLM on pruned checkpoints, and buddy.

    python -m benchmarks.speed.serving            # SmolLM2-135M, CPU, about 20 minutes on 2 cores

Four servers stay up: stock vLLM on the whole model, stock vLLM pruned to 22 and to 15 layers (without repair), and
buddy with the artifact's own router and repair. buddy serves one budget at a time and, as *mixed*, requests of three
budgets in turn; each budget of the mixture (a *class*) has its own rows. Prompts are vLLM's `random` dataset, with and
without a prefix that all prompts of a run share. Prefix caches are emptied before every run. Requests arrive as a
Poisson process at each rate; `inf` means all at once. In each round every variant has one run, with the same prompts
and arrivals, and ratios are taken within a round.

The code of `vllm bench serve` sends and times the requests; only the budget of each request is added. Figures of a run:
output tokens/s; time to first token (TTFT), time per output token (TPOT) and inter-token latency (ITL), p50 and p99, in
ms; goodput, the requests/s that met the objective.

The benchmark refuses to show figures if a server dies, a request fails, outputs differ from the reference's or runs are
missing.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.load import (
    LATENCIES,
    WORKLOADS,
    Load,
    arrival_rate,
    bench_serve,
    class_latencies,
    positive_number,
)
from benchmarks.harness.reference_check import Reference, Routing, served_routings
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, report
from benchmarks.harness.rounds import Refused, Rounds, add_rounds_option, positive_int
from benchmarks.harness.servers import DTYPE, SERVED_NAME, Server, start_server
from vllm_buddy.artifact import SHIPPED_DIR, Artifact, load_artifact
from vllm_buddy.baselines import save_pruned_checkpoint
from vllm_buddy.cli.server_process import HOST
from vllm_buddy.errors import ServerError
from vllm_buddy.method import depth_for_budget, layers_of
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch

MIXED = (1.0, 0.75, 0.5)
PRUNED = (0.75, 0.5)
GOODPUT = "ttft:1000 tpot:50"
NUM_CHECKED = 6
CHECKED_TOKENS = 64


@dataclass
class Served:
    """One thing to measure: a server and the budgets that its requests take in turn; () for stock vLLM."""

    name: str
    server: Server
    budgets: tuple[float, ...] = ()
    routings: list[Routing] = field(default_factory=list)  # one per budget, one for stock vLLM


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_load_options(parser)
    parser.add_argument("--model", type=Path, help="folder of a model; default: the embedded one")
    parser.add_argument("--artifact", type=Path, default=SHIPPED_DIR / DEFAULT_MODEL, help="default: the shipped one")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_serving.jsonl")
    args = parser.parse_args()
    env = environment()
    rows = measure(args.model or fetch(report=print), args.artifact, args)
    report(args.out, rows, env)


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Add --rates, --prefix-rates, --rounds, --seconds, --burst and --goodput."""
    add_rounds_option(parser, 3)
    parser.add_argument(
        "--rates", type=arrival_rate, nargs="+", default=[2, 4, 6, float("inf")], help="requests/s; inf: at once"
    )
    parser.add_argument(
        "--prefix-rates", type=arrival_rate, nargs="*", default=[4], help="the same with a shared prefix"
    )
    parser.add_argument("--seconds", type=positive_number, default=6, help="of arrivals in a run")
    parser.add_argument("--burst", type=positive_int, default=48, help="requests of a run at rate inf")
    parser.add_argument("--goodput", default=GOODPUT, help=f"the objective, in ms; default: {GOODPUT!r}")


def measure(model: Path, artifact_dir: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Start and check the servers, run all loads in all rounds, and return one row per figure.

    args: the options of add_load_options.
    """
    loads = [Load(WORKLOADS[0], rate, args.seconds, args.burst) for rate in args.rates]
    loads += [Load(WORKLOADS[1], rate, args.seconds, args.burst) for rate in args.prefix_rates]
    artifact = load_artifact(artifact_dir)
    with (
        tempfile.TemporaryDirectory(prefix="vllm_buddy-serving-") as work,
        open_servers(model, artifact, artifact_dir, Path(work)) as variants,
    ):
        checked = check(variants, model, artifact)
        for served in variants:  # warms up
            run(served, replace(loads[0], rate=float("inf"), burst=16), seed=0, goodput=args.goodput)
        rows = []
        for load in loads:
            rows += measure_load(variants, checked, load, args.rounds, args.goodput)
    return rows


@contextmanager
def open_servers(model: Path, artifact: Artifact, artifact_dir: Path, work: Path) -> Iterator[list[Served]]:
    """Yield all variants, stock first, with their servers running."""
    num_layers = artifact.config.base_model.num_layers
    one_path = replace(artifact, decision=None).router(library=False)
    with ExitStack() as stack:

        def serve(name: str, folder: Path, *options: str) -> Server:
            return open_server(stack, name, folder, work, *options)

        def stock(name: str, depth: int) -> Served:
            path = one_path.full if depth == num_layers else one_path.path(None, depth)
            folder = model
            if depth < num_layers:
                folder = save_pruned_checkpoint(model, layers_of(path), work / f"pruned-{depth}")
            server = serve(name, folder, "--model-impl", "auto")
            return Served(name, server, (), [Routing(name=name, layers=depth, path=path)])

        variants = [stock("stock", num_layers)]
        variants += [stock(f"pruned {budget}", depth_for_budget(budget, num_layers)) for budget in PRUNED]
        options = f'{{"buddy": {{"artifact": "{artifact_dir}"}}}}'
        server = serve("buddy", model, "--additional-config", options)
        routings = served_routings(artifact, MIXED)
        variants += [Served(f"buddy {b}", server, (b,), [one]) for b, one in zip(MIXED, routings)]
        variants.append(Served("buddy mixed", server, MIXED, routings))
        yield variants


def open_server(stack: ExitStack, name: str, folder: Path, log: Path, *options: str) -> Server:
    """Start a server, wait until it is ready, and stop it with `stack`. Raises Refused if it does not start."""
    print(f"starting server '{name}'", flush=True)
    process = stack.enter_context(start_server(name, folder, log, options))
    try:
        process.wait_until_healthy(lambda *_: None)
    except ServerError as error:
        raise Refused(f"server '{name}' did not start: {error}") from None
    return Server(name, process, folder)


def check(variants: Sequence[Served], model: Path, artifact: Artifact) -> list[str]:
    """Compare the outputs of all servers with the reference, mixed budgets in one batch, and return the names.

    Raises:
        Refused: a server computes something else.
    """
    reference = Reference(model, artifact, getattr(torch, DTYPE))
    rng = np.random.default_rng(0)
    vocab_size = artifact.config.base_model.vocab_size
    for served in variants:
        prompts = rng.integers(vocab_size // 10, vocab_size, (NUM_CHECKED, CHECKED_TOKENS)).tolist()
        asked = [(served.routings[i % len(served.routings)], prompt) for i, prompt in enumerate(prompts)]
        found = served.server.second_token_logprobs(asked)
        for routing in served.routings:
            its = [i for i, (one, _) in enumerate(asked) if one is routing]
            reference.check(routing, [prompts[i] for i in its], [found[i] for i in its])
    return [name for served in variants for name in names(served)]


def measure_load(
    variants: Sequence[Served], checked: Sequence[str], load: Load, num_rounds: int, goodput: str
) -> list[dict[str, Any]]:
    """Return all rows of one load. checked: names whose outputs were checked."""
    rounds = Rounds(num_rounds)
    rounds.mark_checked(checked)
    for index in range(num_rounds):
        for shift in range(len(variants)):
            served = variants[(index + shift) % len(variants)]
            figures = run(served, load, seed=index + 1, goodput=goodput)
            for name, of in figures.items():
                rounds.add(index, name, **of)
        print(f"{load.row}: round {index + 1} of {num_rounds} done", flush=True)
    rows = []
    for served in variants:
        for name in names(served):
            about = {"variant": name, **load.row}
            metrics = ["output_tokens_per_s", *LATENCIES] if name == served.name else list(LATENCIES)
            metrics += ["goodput_per_s"] if name == served.name else []
            rows += [rounds.row(metric, rounds.values(metric, name), **about) for metric in metrics]
            for metric in ("output_tokens_per_s",) if name == served.name else ():
                rows.append(rounds.row("ratio_to_stock", rounds.ratio(metric, name, "stock"), **about))
    return [{**row, "objective": goodput} for row in rows]


def names(served: Served) -> list[str]:
    """Return the names of its rows: its own, and one for each class if budgets are mixed."""
    classes = [f"{served.name}: {budget}" for budget in served.budgets] if len(served.budgets) > 1 else []
    return [served.name, *classes]


def run(served: Served, load: Load, seed: int, goodput: str) -> dict[str, dict[str, float]]:
    """Run once and return figures by name (see `names`) and metric. Raises as `send` does."""
    result = send(served, load, seed, "--goodput", *goodput.split())
    figures = {metric: result[metric] for metric in LATENCIES}
    figures |= {"output_tokens_per_s": result["output_throughput"], "goodput_per_s": result["request_goodput"]}
    by_class = {
        name: class_latencies(result, range(start, load.num_requests, len(served.budgets)))
        for start, name in enumerate(names(served)[1:])
    }
    return {served.name: figures, **by_class}


def send(served: Served, load: Load, seed: int, *more_options: str) -> dict[str, Any]:
    """Return the result of one run of `vllm bench serve`, with the latencies of each request.

    Raises:
        Refused: the server died, or a request failed or was cut short.
    """
    server = served.server
    server.check_alive()
    server.reset_prefix_cache()
    options = ["--model", SERVED_NAME, "--tokenizer", str(server.model_dir)]
    options += ["--host", HOST, "--port", str(server.process.port), "--backend", "openai"]
    options += ["--dataset-name", "random", *load.workload.options]
    options += ["--num-prompts", str(load.num_requests), "--request-rate", str(load.rate), "--seed", str(seed)]
    options += ["--temperature", "0", "--ready-check-timeout-sec", "0", "--disable-tqdm", "--save-detailed"]
    options += ["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99"]
    result = bench_serve([*options, *more_options], served.budgets)
    server.check_alive()
    expected = load.num_requests * load.workload.output
    if result["completed"] != load.num_requests or sum(result["output_lens"]) != expected:
        errors = sorted({error for error in result["errors"] if error})
        raise Refused(
            f"'{served.name}': {result['completed']} of {load.num_requests} requests finished, with "
            f"{sum(result['output_lens'])} of {expected} tokens; nothing is said about it. {' '.join(errors)}"
        )
    return result


if __name__ == "__main__":
    main()
