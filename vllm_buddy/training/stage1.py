"""Runs stage 1 from settings to artifact: prepares the paths and the repair, trains them and fits the router."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.artifact import Artifact, with_drafts, with_token_router
from vllm_buddy.artifact.config import (
    FORMAT_VERSION,
    BuddyConfig,
    LoraConfig,
    PriorConfig,
)
from vllm_buddy.artifact.fingerprint import BaseModelIdentity, identify, weight_digest
from vllm_buddy.baselines import check_static_method, static_prior
from vllm_buddy.errors import TrainingError
from vllm_buddy.method import (
    DecisionModule,
    FoldedDecision,
    LayerPath,
    TokenSchedule,
    full_path,
    path_of,
)
from vllm_buddy.method.budget import depth_for_budget
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.decision import value_table
from vllm_buddy.method.kv_policy import check_kv_policy
from vllm_buddy.method.router import OMEGA
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.training.checkpoint import CHECKPOINT_FILE
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.frozen_base import check_processes, load_base
from vllm_buddy.training.loop import TrainingRun
from vllm_buddy.training.observations import Observations
from vllm_buddy.training.repair import BypassRepair, LoraRepair, Repair
from vllm_buddy.training.router_fit import fit_decision, measure_paths
from vllm_buddy.training.routing import LearnedRouting, LibraryRouting, Routing, TokenRouting
from vllm_buddy.training.stage1_settings import FEWEST_WINDOWS, Stage1Settings
from vllm_buddy.training.start import EXPLORE_DIR, LEARNED, SEARCHED, Note, Origin, Start, find_start
from vllm_buddy.training.teacher import Teacher, check_top_logits
from vllm_buddy.training.token_fit import TokenFit, fit_tokens, measure_tokens

MEASURED_FILE = "measured.npz"
DECISION_WIDTH = 32
ROUTER_DEPTHS = 5  # about as many depths are used to compare paths


def check_settings(settings: Stage1Settings) -> None:
    """Raise a BuddyError for any mistake that can be found before a model is loaded."""
    check_kv_policy(settings.kv_policy)
    if settings.paths not in (SEARCHED, LEARNED):
        check_static_method(settings.paths)
    if settings.paths == LEARNED:
        check_static_method(settings.prior)
    if settings.paths == SEARCHED and settings.recipe != "bypass":
        raise TrainingError("paths are searched for a bypass; for LoRA set paths to learned or to a static method")
    if settings.router_windows and settings.paths != SEARCHED:
        raise TrainingError("router_windows compares searched paths; set paths to searched")


def check_fits(settings: Stage1Settings, base: BaseModelIdentity) -> None:
    """Raise a BuddyError for settings that do not fit the model."""
    check_top_logits(settings.top_logits, base.vocab_size)
    if depth_for_budget(settings.min_budget, base.num_layers) == base.num_layers:
        raise TrainingError(
            f"min_budget {settings.min_budget:g} is all {base.num_layers} layers, so none is skipped; lower it"
        )


def run_stage1(
    settings: Stage1Settings, model_dir: Path, report: Callable[[dict[str, Any]], None], note: Note
) -> tuple[Artifact, TrainingRun]:
    """Train, or continue a run that was stopped; returns the artifact, which is not saved yet, and the run.

    report: called with the log row of each step. note: called with a line of text about each other stage of the work.
    Of several processes, the main one calls them.

    Raises:
        BuddyError: settings, data or model cannot be used, the loss is not finite, or the disk is full.
    """
    from accelerate import Accelerator

    check_settings(settings)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {settings.out}: {error.strerror or error}") from None
    accelerator = Accelerator()
    check_processes(settings, accelerator)
    note = note if accelerator.is_main_process else lambda _: None
    torch.manual_seed(settings.seed)
    base, weights = identify(model_dir, settings.base_model_id), weight_digest(model_dir)
    check_fits(settings, base)
    origin = Origin.of(settings, base, weights)
    tokenizer = load_tokenizer(model_dir)
    used = settings.tokens // settings.length
    drawn = max(used, settings.token_windows) if settings.schedule == "token" else used
    corpus = Corpus.read(settings.data, settings.data_dir, tokenizer, settings.length, drawn, settings.seed)
    token_windows = np.unique(corpus.order[: settings.token_windows])
    corpus = dataclasses.replace(corpus, order=corpus.order[:used])
    model: Any = load_base(settings, model_dir, accelerator)
    if settings.length > model.config.max_position_embeddings:
        raise TrainingError(f"length {settings.length} is beyond the model's {model.config.max_position_embeddings}")
    teacher = None
    if settings.recipe != "paper":
        folder = (settings.cache_dir or settings.out) / f"teacher-{weights}-{corpus.digest}"
        form = "-".join(part for part in (settings.dtype, settings.base_quantisation) if part is not None)
        teacher = Teacher(model, corpus, settings.top_logits, folder / f"{form}-{settings.top_logits}")
    explored, main = split(settings, corpus)
    if settings.router_windows and (num := len(np.unique(main[1].order))) < FEWEST_WINDOWS:
        raise TrainingError(
            f"a Decision Module is fitted on {FEWEST_WINDOWS} sequences or more, and training has {num}; raise tokens, "
            "add text, or set router_windows to 0"
        )
    start = find_start(settings, base, origin, model, corpus, explored, teacher, accelerator, report, note)
    repair, frozen = _repair(settings, model, start)
    smallest = depth_for_budget(settings.min_budget, base.num_layers)
    library = start.library(settings.library if settings.router_windows else 1, smallest)
    constant = LibraryRouting(base.num_layers, library, settings.route_every, settings.first_share)
    routing: Routing = constant
    observations, fit, refit = None, None, None
    if settings.schedule == "token":
        assert teacher is not None
        with accelerator.main_process_first():  # the others would map a file that it makes longer
            begins = accelerator.is_main_process and not (settings.out / CHECKPOINT_FILE).is_file()
            num_rows = main[0].num_steps * settings.batch
            observations = Observations.open(settings.out, num_rows, settings.length, fresh=begins)
        fit = _TokenFitter(settings, model, corpus, library, observations, note, origin.digest)
        router = fit.measured(start.bypass, teacher, token_windows).router
        by_token = TokenRouting(router, TokenSchedule(), constant)
        routing, refit = by_token, partial(_refit, fit, by_token)
    if settings.paths == LEARNED:
        values = value_table(model)
        decision = DecisionModule(values.shape[1], base.num_layers - 2, DECISION_WIDTH).to(accelerator.device)
        routing = LearnedRouting(decision, values, static_prior(start.order))
    run = TrainingRun(*main, model, repair, routing, teacher, accelerator, frozen, report)
    run.origin = origin.digest
    if start.artifact is not None:
        run.started_from = f"{start.artifact.config.name} {start.artifact.digest}"
    run.observations, run.refit = observations, refit
    run.train()
    folded = None
    if isinstance(routing, LearnedRouting):
        folded = FoldedDecision.fold(routing.decision.cpu(), values.cpu())  # as trained: LoRA changes the model's
    elif settings.router_windows:
        trained = {depth: paths for depth, paths in library.items() if depth >= smallest}
        folded = _fit_router(run, trained, static_prior(start.order), note)
    artifact = _artifact(settings, base, start, repair, folded, library)
    if fit is not None:
        found = fit.observed(main[0].num_steps)
        run.router_figures = {"explained": dict(zip(map(str, settings.token_depths), found.explained))}
        artifact = with_token_router(artifact, found.router)
    if start.artifact is not None:
        artifact = _with_kept(artifact, start.artifact, settings)
    return artifact, run


def _with_kept(artifact: Artifact, before: Artifact, settings: Stage1Settings) -> Artifact:
    """Add what an artifact had that is of use with another bypass of the same paths.

    Draft exits with bypasses of their own depend on the base model alone. The Budget Predictor reads prompts, and goes
    on choosing as it did.
    """
    if before.predictor is not None and settings.schedule == "request":
        config = artifact.config.model_copy(update={"predictor": before.config.predictor})
        artifact = dataclasses.replace(artifact, config=config, predictor=before.predictor)
    if before.drafts and before.drafts[0].bypass is not None:
        artifact = with_drafts(artifact, before.drafts, before.draft_vocabulary)
    return artifact


def split(
    settings: Stage1Settings, corpus: Corpus
) -> tuple[tuple[Stage1Settings, Corpus], tuple[Stage1Settings, Corpus]]:
    """Return settings and data of the exploration, then of the training after it; together they use `tokens`."""
    count = settings.explore_tokens // (settings.batch * settings.length) * settings.batch
    rest = settings.tokens - count * settings.length
    explore = settings.model_copy(update={"out": settings.out / EXPLORE_DIR, "tokens": count * settings.length})
    return (
        (explore, dataclasses.replace(corpus, order=corpus.order[:count])),
        (settings.model_copy(update={"tokens": rest}), dataclasses.replace(corpus, order=corpus.order[count:])),
    )


def _repair(settings: Stage1Settings, model: nn.Module, start: Start) -> tuple[Repair, Callable[[], Any]]:
    """Return the repair, and a context manager inside which the model is the base model."""
    if start.bypass is not None:
        device = next(model.parameters()).device
        return BypassRepair(start.bypass.to(torch.empty(0, device=device))), contextlib.nullcontext
    repair = LoraRepair(model, settings.rank, settings.lora_alpha)
    return repair, repair.disabled


@torch.no_grad()
def _fit_router(
    run: TrainingRun, library: Mapping[int, Sequence[Sequence[int]]], prior: np.ndarray, note: Note
) -> FoldedDecision:
    """Fit a Decision Module that picks among the paths of `library`."""
    settings, num_layers = run.settings, run.model.config.num_hidden_layers
    windows = np.unique(run.corpus.order)
    windows = np.random.default_rng(settings.seed).permutation(windows)[: settings.router_windows]
    depths = sorted(library)[:: max(1, len(library) // ROUTER_DEPTHS)]
    note(f"measuring the paths of depths {', '.join(map(str, depths))} on {len(windows)} sequences")
    measured = measure_paths(run.path_losses, windows, library, depths, num_layers)
    values = value_table(run.model).to("cpu")
    context = torch.from_numpy(run.corpus.sequences[windows, : settings.router_context].astype(np.int64))
    bias = torch.from_numpy(OMEGA * (prior - prior.mean()) / (prior.std() + 1e-12)).float()
    fit = fit_decision(
        values[context].mean(dim=1), values[context[:, -1]], measured, bias, DECISION_WIDTH, settings.seed
    )
    for f in fit.figures:
        note(
            f"depth {f.depth}: held-out nats per token {f.static:.4f} on the static path, {f.routed:.4f} routed, "
            f"{f.oracle:.4f} on the best path of each sequence"
        )
    run.router_figures = {str(f.depth): dataclasses.asdict(f) for f in fit.figures}
    return FoldedDecision.fold(fit.decision, values)


def _nested_paths(
    settings: Stage1Settings, library: Mapping[int, list[list[int]]], num_layers: int
) -> tuple[LayerPath, ...]:
    """The paths of schedule token: the first of each of `token_depths`, and the whole model."""
    if missing := sorted(set(settings.token_depths) - set(library)):
        raise TrainingError(f"there is no path of {missing} layers; known depths are {sorted(library)}")
    return (*(path_of(library[depth][0]) for depth in settings.token_depths), full_path(num_layers))


class _TokenFitter:
    """Fits the router of single tokens: to a measurement before training, to what training observes after that."""

    def __init__(
        self,
        settings: Stage1Settings,
        model: Any,
        corpus: Corpus,
        library: Mapping[int, list[list[int]]],
        observations: Observations,
        note: Note,
        origin: str,
    ) -> None:
        self._settings, self._model, self._note = settings, model, note
        self._corpus, self._observations, self._origin = corpus, observations, origin
        self._num_layers = model.config.num_hidden_layers
        self._values = value_table(model).cpu()
        self._paths = _nested_paths(settings, library, self._num_layers)

    def measured(self, bypass: Bypass | None, teacher: Teacher, windows: np.ndarray) -> TokenFit:
        """Run every path over the sequences `windows`, [n]; a run that goes on takes what it measured before."""
        digest = f"{self._settings.digest}-{self._corpus.digest}-{self._origin}"
        file = self._settings.out / MEASURED_FILE
        if (known := Observations.load(file, digest)) is not None:
            return self._fit(known)
        self._note(f"measuring the divergence of each token on {len(self._paths) - 1} paths, {len(windows)} sequences")
        windows = np.random.default_rng(self._settings.seed).permutation(windows)
        found = measure_tokens(self._model, bypass, teacher, self._corpus.sequences, windows, self._paths)
        found.save(file, digest)
        return self._fit(found)

    def observed(self, num_steps: int) -> TokenFit:
        """Take what was observed in the second half of the first `num_steps` steps."""
        rows = slice(num_steps // 2 * self._settings.batch, num_steps * self._settings.batch)
        observed = self._observations.routed(rows)
        self._note(f"fitting the router to {observed.choices.size} tokens that were observed in training")
        return self._fit(observed)

    def _fit(self, observed: Observations) -> TokenFit:
        settings = self._settings
        found = fit_tokens(observed, self._corpus.sequences, self._values, self._paths, self._num_layers, settings.seed)
        for number, (depth, explained) in enumerate(zip(settings.token_depths, found.explained)):
            mean = float(observed.divergences[observed.choices == number].mean(dtype=np.float64))
            self._note(f"  {depth} layers: {mean:.4f} nats per token, {explained:.0%} of the variance explained")
        return found


def _refit(fit: _TokenFitter, routing: TokenRouting, num_steps: int) -> None:
    if num_steps:
        routing.router = fit.observed(num_steps).router


def _artifact(
    settings: Stage1Settings,
    base: BaseModelIdentity,
    start: Start,
    repair: Repair,
    folded: FoldedDecision | None,
    library: Mapping[int, list[list[int]]],
) -> Artifact:
    bypass, deltas = repair.bypass(), repair.deltas()
    prior = PriorConfig(indicator=settings.prior, calibration="as `vllm-buddy orders` has it", num_tokens=0)
    if settings.paths == SEARCHED:
        names = ", ".join(source.name for source in settings.data)
        prior = PriorConfig(indicator="searched", calibration=names, num_tokens=settings.search_tokens)
    elif settings.paths != LEARNED:
        prior = prior.model_copy(update={"indicator": settings.paths})
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name=settings.name or settings.out.absolute().name,
        base_model=base,
        prior=prior,
        omega=OMEGA,
        has_decision_module=folded is not None,
        library=None if settings.paths == LEARNED else dict(library),
        route_every=settings.decide_every,
        recipe=settings.recipe,
        budgets=(settings.min_budget, 1.0),
        bypass_rank=bypass.rank if bypass is not None else 0,
        bypass_eps=bypass.eps if bypass is not None else 0.0,
        lora=LoraConfig(rank=deltas.rank, alpha=deltas.alpha) if deltas is not None else None,
    )
    rounded = None if bypass is None else bypass.rounded()
    if start.artifact is None:
        return Artifact(config, static_prior(start.order), folded, rounded, deltas)
    # All that is not trained here stays as it was, but a Budget Predictor knows the losses with another bypass, and
    # adapters the states after it.
    kept = start.artifact.without_predictor().without_drafts()
    update: dict[str, Any] = {"name": config.name, "budgets": config.budgets, "token": None}
    if settings.decide_every is not None:
        update["route_every"] = settings.decide_every
    if folded is not None:
        update["has_decision_module"] = True
    if settings.paths == LEARNED:  # the module was trained to choose any layers
        update["library"] = None
    decision = kept.decision if folded is None else folded
    return dataclasses.replace(
        kept, config=kept.config.model_copy(update=update), decision=decision, bypass=rounded, token=None
    )
