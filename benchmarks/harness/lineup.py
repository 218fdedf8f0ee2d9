"""The engines that CPU benchmarks compare: stock vLLM, stock vLLM on pruned checkpoints, and buddy, in one process."""

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm import LLM

from benchmarks.harness import engines
from benchmarks.harness.engines import Variant
from benchmarks.harness.reference_check import Reference
from benchmarks.harness.result_rows import device
from benchmarks.harness.rounds import Refused, Rounds
from vllm_buddy.artifact import SHIPPED_DIR, Artifact, identify, load_artifact
from vllm_buddy.baselines import save_pruned_checkpoint
from vllm_buddy.method import (
    DecisionModule,
    FoldedDecision,
    LayerPath,
    PathSchedule,
    Router,
    depth_for_budget,
    layers_of,
)
from vllm_buddy.method.kv_policy import KV_ONLY
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS

NUM_DRAFTS = 5  # per step


class Lineup:
    """Engines for one model and one artifact. Each starts when it is first needed and lives as long as the process.

    All requests of buddy at one budget share a path, unless a variant asks for the artifact's own router. For a shared
    path the Decision Module has the real size and scores the layers, but its last layer is zero, so the prior decides.
    """

    def __init__(
        self,
        model: Path,
        artifact: Artifact,
        work: Path,
        reference: Path | None = None,
        change: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """reference: what Hugging Face loads to compute, after `change`, what `model` does; None: `model` itself."""
        self.model = model
        self.artifact = artifact
        self._work = work
        self._stock_engines: dict[LayerPath, LLM] = {}
        self._reference: Reference | None = None
        self._reference_model, self._change = reference or model, change
        self._one_path = single_path_artifact(artifact)

    @property
    def num_layers(self) -> int:
        return self.artifact.config.base_model.num_layers

    def depth(self, budget: float) -> int:
        """Return the number of layers executed at `budget`."""
        return depth_for_budget(budget, self.num_layers)

    @property
    def vocab_size(self) -> int:
        return self.artifact.config.base_model.vocab_size

    @cached_property
    def router(self) -> Router:
        """Gives one path per budget, at the cost of a Decision Module of the real size."""
        return self._one_path.router()

    @cached_property
    def buddy(self) -> LLM:
        """The routed engine that all variants of buddy share."""
        self._one_path.save(self._work / "artifact")
        options = {"artifact": str(self._work / "artifact")}
        return engines.start_engine(str(self.model), model_impl="buddy", additional_config={"buddy": options})

    @cached_property
    def by_token(self) -> LLM:
        """The routed engine in which tokens have depths of their own, under `kv_only`."""
        self.artifact.save(self._work / "artifact-token")
        options = {"artifact": str(self._work / "artifact-token"), "schedule": {"prefill": "token", "decode": "token"}}
        return engines.start_engine(str(self.model), model_impl="buddy", additional_config={"buddy": options})

    @cached_property
    def drafting(self) -> LLM:
        """The routed engine whose requests are drafted for: by n-grams, and in lossless mode by layers too."""
        self._one_path.save(self._work / "artifact")
        options = {"artifact": str(self._work / "artifact"), "drafts": {"ngram_min": 1, "ngram_max": 3}}
        speculator = {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": NUM_DRAFTS}
        return engines.start_engine(
            str(self.model), model_impl="buddy", additional_config={"buddy": options}, speculative_config=speculator
        )

    def path(self, depth: int) -> LayerPath:
        """Return the one path of `depth` layers."""
        return replace(self._one_path, decision=None).router().path(None, depth)

    def stock(self) -> Variant:
        """Return stock vLLM on the whole model."""
        return self._stock_variant("stock", self.num_layers, self.router.full)

    def pruned(self, budget: float) -> Variant:
        """Return stock vLLM on a checkpoint with only the layers of buddy's path, without any repair."""
        depth = self.depth(budget)
        return self._stock_variant(f"pruned {budget}", depth, self.path(depth))

    def routed(
        self,
        budget: float,
        *,
        bypass: bool = True,
        own_paths: bool = False,
        schedule: PathSchedule | None = None,
        note: str = "",
    ) -> Variant:
        """Return buddy at one budget.

        bypass: False leaves skipped rows unchanged, as with an artifact without bypass. own_paths: use the paths that
        the artifact's own Decision Module picks. schedule: None is the server's default. note: end of the name.
        """
        return Variant(
            name=", ".join(part for part in (f"buddy {budget}", note) if part),
            layers=self.depth(budget),
            llm=self.buddy,
            budget=budget,
            router=self.artifact.router() if own_paths else self.router,
            schedule=schedule or PathSchedule(),
            bypass=bypass,
        )

    def routed_by_token(self, budget: float, *, decode: bool = True, note: str = "token") -> Variant:
        """Return buddy with schedule `token`. decode: False gives depths per token to the prompt alone."""
        return Variant(
            name=f"buddy {budget}, {note}",
            layers=self.depth(budget),
            llm=self.by_token,
            budget=budget,
            router=self.router,
            tokens=self.artifact.token,
            by_token=(True, decode),
            kv_policy=KV_ONLY,
        )

    def draw_prompts(self, rng: np.random.Generator, num_prompts: int, num_tokens: int) -> list[list[int]]:
        """Draw random token ids, without the beginning of the vocabulary, which holds special tokens."""
        return rng.integers(self.vocab_size // 10, self.vocab_size, (num_prompts, num_tokens)).tolist()

    def about(self) -> dict[str, Any]:
        """Return what a results row says about the artifact."""
        config = self.artifact.config
        return {
            "artifact": config.name,
            "digest": self.artifact.digest,
            "recipe": config.recipe,
            "bypass_rank": config.bypass_rank,
        }

    def check(self, variants: Sequence[Variant], prompts: Sequence[list[int]], rounds: Rounds) -> None:
        """Compare the outputs of all variants with the plain forward and mark the variants as checked in `rounds`.

        Raises:
            Refused: a variant computes something else.
        """
        for variant in variants:
            self.check_together([(variant, prompt) for prompt in prompts], rounds, variant.name)

    def check_together(self, asked: Sequence[tuple[Variant, list[int]]], rounds: Rounds, name: str) -> None:
        """Do the same for one batch of several variants of one engine, and mark it as `name`."""
        if self._reference is None:
            dtype = asked[0][0].llm.llm_engine.model_config.dtype
            self._reference = Reference(self._reference_model, self.artifact, dtype, self._change)
        found = engines.second_token_logprobs_together(asked)
        for variant in {id(variant): variant for variant, _ in asked}.values():
            its = [i for i, (one, _) in enumerate(asked) if one is variant]
            self._reference.check(variant, [asked[i][1] for i in its], [found[i] for i in its])
        rounds.mark_checked([name])

    def _stock_variant(self, name: str, layers: int, path: LayerPath) -> Variant:
        if path not in self._stock_engines:
            folder = self.model
            if path != self.router.full:
                folder = save_pruned_checkpoint(self.model, layers_of(path), self._work / f"pruned-{path:x}")
            self._stock_engines[path] = engines.start_engine(str(folder))
        return Variant(name=name, layers=layers, path=path, llm=self._stock_engines[path])


def add_lineup_options(parser: argparse.ArgumentParser, artifact: str = DEFAULT_MODEL) -> None:
    """Add --model and --artifact. artifact: the shipped one that is taken if none is named."""
    parser.add_argument("--model", type=Path, help="folder of a model; default: the embedded one")
    parser.add_argument(
        "--artifact",
        type=Path,
        default=SHIPPED_DIR / artifact,
        help="artifact of the model, with its bypass or LoRA; default: the shipped one",
    )


@contextmanager
def open_lineup(args: argparse.Namespace, *, on_gpu: bool = False) -> Iterator[Lineup]:
    """Make the line-up that the options ask for, and remove its files afterwards.

    on_gpu: whether the benchmark can run there too: it must take no bypass away and time whole steps alone.

    Raises:
        Refused: the artifact is another model's. Or there is a GPU: there, captured steps keep the bypasses that they
            were captured with, and the parts of a step cannot be told apart from outside.
    """
    if device() == "cuda" and not on_gpu:
        raise Refused(
            "this compares engines side by side on a CPU; on a GPU run python -m benchmarks.speed.decode --device cuda"
        )
    model, artifact = Path(args.model or fetch(report=print)), load_artifact(args.artifact)
    if not artifact.config.base_model.same_model(found := identify(model)):
        raise Refused(
            f"artifact '{artifact.config.name}' was made for {artifact.config.base_model.summary()}, but the model is "
            f"{found.summary()}; name the model's own with --artifact"
        )
    work = Path(tempfile.mkdtemp(prefix="vllm_buddy-bench-"))
    try:
        yield Lineup(model, artifact, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def single_path_artifact(artifact: Artifact) -> Artifact:
    """Return the artifact with a Decision Module of the real size that scores all layers alike: the prior decides."""
    base = artifact.config.base_model
    torch.manual_seed(0)
    module = DecisionModule(value_dim=192, num_middle=base.num_layers - 2)
    torch.nn.init.zeros_(module.w2.weight)
    torch.nn.init.zeros_(module.w2.bias)
    decision = FoldedDecision.fold(module, torch.randn(base.vocab_size, 192))
    config = artifact.config.model_copy(update={"name": "benchmark", "has_decision_module": True, "library": None})
    return replace(artifact, config=config, decision=decision)
