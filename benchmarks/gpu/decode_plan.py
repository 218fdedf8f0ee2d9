"""Plans the decode benchmark on a GPU: which models it measures, in which engines and in which batches."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine_agreement import peer
from benchmarks.gpu.engine_job import NO_BYPASS, EngineJob
from benchmarks.gpu.model_shapes import LLAMA_8B, MODEL_SHAPES, ModelShape
from benchmarks.harness.lineup import single_path_artifact
from benchmarks.harness.reference_check import Routing
from benchmarks.harness.rounds import positive_int
from vllm_buddy.artifact import Artifact, load_artifact
from vllm_buddy.baselines import save_pruned_checkpoint
from vllm_buddy.method import Router, depth_for_budget, layers_of, path_of
from vllm_buddy.models.embedded import fetch

SMOLLM2 = "SmolLM2-135M"
BUDGETS = (1.0, 0.75, 0.5)


@dataclass(frozen=True)
class Plan:
    """What to measure. runs: (batch, tokens per prompt). options: for every engine, used by tests."""

    shapes: Sequence[str]
    runs: Sequence[tuple[int, int]]
    steps: int
    repeats: int
    budgets: Sequence[float] = BUDGETS
    options: dict[str, Any] = field(default_factory=dict)


QUICK = Plan((LLAMA_8B.name,), ((1, 1024), (32, 1024), (128, 1024), (32, 8192)), steps=48, repeats=3)


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only --device cuda has."""
    options = parser.add_argument_group("with --device cuda")
    names = [*MODEL_SHAPES, SMOLLM2]
    options.add_argument("--shapes", nargs="+", choices=names, help="default: all")
    options.add_argument("--context", type=positive_int, nargs="+", help="tokens per prompt; default: 1024 8192")
    options.add_argument("--repeats", type=positive_int, help="of --tokens decode steps each; default: 5")
    options.add_argument("--only-quick", action="store_true", help="one shape and four runs, in about six minutes")


def refuse_gpu_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with an error if one of these options was given without --device cuda."""
    for option in ("shapes", "context", "repeats", "only_quick"):
        if getattr(args, option):
            parser.error(f"--{option.replace('_', '-')} is for --device cuda alone")


def plan_of(args: argparse.Namespace) -> Plan:
    """Return the plan for these options. None stands for an option's default."""
    shapes = args.shapes or (QUICK.shapes if args.only_quick else [*MODEL_SHAPES, SMOLLM2])
    runs: Sequence[tuple[int, int]] = QUICK.runs
    if not args.only_quick or args.batch or args.context:
        runs = [(batch, c) for c in args.context or (1024, 8192) for batch in args.batch or (1, 8, 32, 128)]
    steps = args.tokens or (QUICK.steps if args.only_quick else 64)
    return Plan(shapes, runs, steps, args.repeats or (QUICK.repeats if args.only_quick else 5))


@dataclass(frozen=True)
class Subject:
    """A model and an artifact with one path per budget. work: a folder for checkpoints made from them.

    shape: of a model with drawn weights; None: the folder `model` has weights.
    """

    name: str
    model: Path
    artifact: Artifact
    work: Path
    shape: ModelShape | None = None

    @property
    def num_layers(self) -> int:
        return self.artifact.config.base_model.num_layers

    @property
    def vocab_size(self) -> int:
        return self.artifact.config.base_model.vocab_size

    @property
    def has_bypass(self) -> bool:
        return self.artifact.bypass is not None

    def layers(self, budget: float) -> Sequence[int]:
        """Return the layers of buddy's path at `budget`."""
        if budget == 1.0:
            return range(self.num_layers)
        return layers_of(Router(self.num_layers, self.artifact.prior).path(None, self.depth(budget)))

    def depth(self, budget: float) -> int:
        """Return the number of layers executed at `budget`."""
        return depth_for_budget(budget, self.num_layers)

    def variants(self, budgets: Sequence[float]) -> list[Routing]:
        """Return everything that is compared, stock first."""
        router = self.artifact.router()
        below = [budget for budget in budgets if budget < 1.0]
        peers = [Routing(name=peer(b), layers=self.depth(b), path=path_of(self.layers(b))) for b in (1.0, *below)]
        buddy = [Routing(name=f"buddy {b}", layers=self.depth(b), budget=b, router=router) for b in budgets]
        plain = [replace(v, name=v.name + NO_BYPASS, bypass=False) for v in buddy if v.budget in below]
        return [*peers, *buddy, *(plain if self.has_bypass else [])]

    def jobs(self, plan: Plan) -> Iterator[EngineJob]:
        """Yield one job per engine, buddy first: its KV cache is the smallest, and others skip what it leaves out."""
        self.artifact.save(self.work / "artifact")
        yield self._job(
            plan, "buddy", 1.0, artifact=str(self.work / "artifact"), budgets=plan.budgets, has_bypass=self.has_bypass
        )
        for budget in (1.0, *sorted(b for b in plan.budgets if b < 1.0)):
            yield self._job(plan, peer(budget), budget)

    def _job(self, plan: Plan, name: str, budget: float, **of_buddy: Any) -> EngineJob:
        layers, model = self.layers(budget), self.model
        if len(layers) < self.num_layers:
            folder = self.work / name.replace(" ", "-")
            if self.shape is None:
                model = save_pruned_checkpoint(self.model, layers, folder)
            else:
                model = self.shape.save(folder, len(layers))
        return EngineJob(
            name,
            str(model),
            self.vocab_size,
            plan.runs,
            plan.steps,
            plan.repeats,
            layers=None if self.shape is None else list(layers),
            options=plan.options,
            **of_buddy,
        )


def drawn_subject(shape: ModelShape, work: Path) -> Subject:
    """Return the subject for a model with drawn weights."""
    return Subject(shape.name, shape.save(work / "whole"), single_path_artifact(shape.artifact()), work, shape)


def real_subject(args: argparse.Namespace, work: Path) -> Subject:
    """Return the subject for the model of --model and --artifact."""
    artifact = single_path_artifact(load_artifact(args.artifact))
    return Subject(SMOLLM2, args.model or fetch(report=print), artifact, work)
