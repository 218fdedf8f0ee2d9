"""Decode speed against stock vLLM and against physical pruning, in one process, alternating.

    python benchmarks/decode.py            # SmolLM2-135M, CPU, about 12 minutes on 2 cores

Engines: stock dense; stock on a checkpoint pruned to the layers of buddy's path, for each budget, without any repair;
buddy with the artifact's bypass, where it has one. Requests of buddy share one path per budget: the Decision Module has
the real size and scores the layers anew every 16 tokens (the server's default; R=1: before every token), but its last
layer is zero, so that the prior decides. With an artifact that has a Decision Module of its own there are variants
routed by that, too: requests then run different paths, and a step costs the union of them. Ratios are taken within a
round, where all variants ran one after the other, and are tokens/s over tokens/s: above 1 is faster than the peer.

The run checks what it times: every variant must give the distributions of the method's plain forward over the same
layers, with bypass and LoRA where it has them.
"""

import argparse
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import engines
import numpy as np
import torch
from engines import DecodeRun, Variant
from reference_check import Reference
from result_rows import RESULTS_DIR, environment, percentiles, write_rows

from vllm_buddy.artifact import SHIPPED_DIR, Artifact, load_artifact
from vllm_buddy.baselines import save_pruned_checkpoint
from vllm_buddy.embedded_model import DEFAULT_MODEL, fetch
from vllm_buddy.method import DecisionModule, FoldedDecision, PathSchedule, Router, depth_for_budget, layers_of

BUDGETS = (0.75, 0.5)
PROMPT_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=33, help="decoded tokens per run; each gives one step")
    parser.add_argument("--model", type=FilePath, help="folder of a model; default: the embedded one")
    parser.add_argument(
        "--artifact",
        type=FilePath,
        default=SHIPPED_DIR / DEFAULT_MODEL,
        help="artifact of the model, with its bypass or LoRA; default: the shipped one",
    )
    parser.add_argument("--out", type=FilePath, default=RESULTS_DIR / "cpu_decode.jsonl")
    args = parser.parse_args()
    work = FilePath(tempfile.mkdtemp(prefix="vllm_buddy-bench-"))
    try:
        model = args.model or fetch(report=print)
        rows = measure(model, load_artifact(args.artifact), work, args.batch, args.rounds, args.tokens)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    write_rows(args.out, rows)
    for row in rows:
        print(
            f"{row['variant']:22} batch {row['batch']:3}  {row['metric']:16} {row['p50']:8.3f}"
            f"  [{row['p20']:.3f}, {row['p80']:.3f}]"
        )
    print(f"written to {args.out}")


def measure(
    model: FilePath, artifact: Artifact, work: FilePath, batches: list[int], rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """Start all engines, check their tokens against each other, time them; one row per figure."""
    num_layers = artifact.config.base_model.num_layers
    one_path = single_path_artifact(artifact)
    one_path.save(work / "artifact")
    router, prior_only = one_path.router(), replace(one_path, decision=None).router()
    variants = [Variant("stock", num_layers, engines.start_engine(str(model)), router.full)]
    for budget in BUDGETS:
        depth = depth_for_budget(budget, num_layers)
        path = prior_only.path(None, depth)
        pruned = save_pruned_checkpoint(model, layers_of(path), work / f"pruned-{depth}")
        variants.append(Variant(f"pruned {budget}", depth, engines.start_engine(str(pruned)), path))
    options = {"artifact": str(work / "artifact")}
    buddy = engines.start_engine(str(model), model_impl="buddy", additional_config={"buddy": options})

    def routed(name: str, budget: float, router: Router, schedule: PathSchedule) -> Variant:
        return Variant(name, depth_for_budget(budget, num_layers), buddy, None, budget, router, schedule)

    default, every_token = PathSchedule(), PathSchedule(interval=1)
    variants += [routed(f"buddy {budget}", budget, router, default) for budget in (1.0, *BUDGETS)]
    variants.append(routed("buddy 0.5, R=1", 0.5, router, every_token))
    if artifact.decision is not None:
        own = artifact.router()
        variants += [routed(f"buddy {budget}, own paths", budget, own, default) for budget in BUDGETS]
    reference = Reference(model, artifact, buddy.llm_engine.model_config.dtype)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        rng = np.random.default_rng(batch)
        draw = partial(draw_prompts, rng, batch, artifact.config.base_model.vocab_size)
        reference.check(variants, draw())
        rows += measure_batch(variants, batch, draw, rounds, tokens)
    config = artifact.config
    about = {"artifact": config.name, "recipe": config.recipe, "bypass_rank": config.bypass_rank, **environment("cpu")}
    return [{**row, **about} for row in rows]


def draw_prompts(rng: np.random.Generator, batch: int, vocab_size: int) -> list[list[int]]:
    """Random token ids, without those at the beginning of the vocabulary, where special ones are."""
    return rng.integers(vocab_size // 10, vocab_size, (batch, PROMPT_TOKENS)).tolist()


def measure_batch(
    variants: list[Variant], batch: int, draw: Callable[[], list[list[int]]], rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """All figures of one batch size."""
    ms: dict[str, list[float]] = {v.name: [] for v in variants}
    overhead: dict[str, list[float]] = {v.name: [] for v in variants if v.budget is not None}
    for index in range(rounds + 1):
        prompts = draw()
        runs: dict[str, DecodeRun] = {}
        first = index % len(variants)
        for variant in variants[first:] + variants[:first]:
            with Overhead(variant) as spent:
                runs[variant.name] = engines.decode(variant, prompts, tokens)
            if index > 0:  # round 0 warms up
                ms[variant.name].append(float(np.median(runs[variant.name].step_ms)))
                if variant.budget is not None:
                    overhead[variant.name].append(spent.share(runs[variant.name]))
    rows = []
    for variant in variants:
        common = {"variant": variant.name, "batch": batch, "budget": variant.budget, "layers": variant.layers}
        own = np.array(ms[variant.name])
        figures = {"ms_per_step": own, "ratio_to_stock": np.array(ms["stock"]) / own}
        if variant.budget is not None:
            figures["ratio_to_pruned"] = np.array(ms[peer_of(variant)]) / own
            figures["routing_share"] = np.array(overhead[variant.name])
        rows += [{"metric": m, **common, **percentiles(v.tolist()), "n": len(v)} for m, v in figures.items()]
    return rows


class Overhead:
    """Time the engine spends on router, plan and views while the block runs."""

    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._seconds = 0.0

    def _total(self) -> float:
        if self._variant.budget is None:
            return 0.0
        metrics = engines.core(self._variant.llm).scheduler._metrics
        return metrics.routing_seconds + engines.model_runner(self._variant.llm).buddy_view_seconds

    def __enter__(self) -> "Overhead":
        self._before = self._total()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = self._total() - self._before

    def share(self, run: DecodeRun) -> float:
        """Of the time of all steps, the prefill with the routing of the arriving requests included."""
        return self._seconds * 1e3 / sum(run.all_ms)


def peer_of(variant: Variant) -> str:
    """The variant with the same layers on stock vLLM."""
    return "stock" if variant.budget == 1.0 else f"pruned {variant.budget}"


def single_path_artifact(artifact: Artifact) -> Artifact:
    """An artifact with a Decision Module of the real size that finds all layers alike, so that the prior decides."""
    base = artifact.config.base_model
    torch.manual_seed(0)
    module = DecisionModule(value_dim=192, num_middle=base.num_layers - 2)
    torch.nn.init.zeros_(module.w2.weight)
    torch.nn.init.zeros_(module.w2.bias)
    decision = FoldedDecision.fold(module, torch.randn(base.vocab_size, 192))
    config = artifact.config.model_copy(update={"name": "benchmark", "has_decision_module": True, "library": None})
    return replace(artifact, config=config, decision=decision)


if __name__ == "__main__":
    main()
