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

from vllm_buddy.artifact import Artifact, with_token_router
from vllm_buddy.artifact.files import check_size
from vllm_buddy.artifact.fingerprint import BaseModelIdentity, identify, weight_digest
from vllm_buddy.baselines import check_static_method, static_prior
from vllm_buddy.errors import TrainingError
from vllm_buddy.method import DecisionModule, FoldedDecision, TokenSchedule
from vllm_buddy.method.budget import MIN_DEPTH, depth_for_budget
from vllm_buddy.method.decision import value_table
from vllm_buddy.method.kv_policy import check_kv_policy
from vllm_buddy.method.router import standardised
from vllm_buddy.models.folder import load_config, load_tokenizer
from vllm_buddy.training.checkpoint import CHECKPOINT_FILE
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.curves import check_plotting
from vllm_buddy.training.frozen_base import check_packages, check_processes, load_base, make_accelerator
from vllm_buddy.training.loop import TrainingRun
from vllm_buddy.training.observations import Observations
from vllm_buddy.training.out_folder import check_run_folder
from vllm_buddy.training.repair import BypassRepair, LoraRepair, Repair
from vllm_buddy.training.router_fit import fit_decision, measure_paths
from vllm_buddy.training.routing import LearnedRouting, LibraryRouting, Routing, TokenRouting
from vllm_buddy.training.stage1_artifact import check_described, trained_artifact, with_kept
from vllm_buddy.training.stage1_settings import FEWEST_WINDOWS, Stage1Settings
from vllm_buddy.training.start import EXPLORE_DIR, LEARNED, SEARCHED, Note, Origin, Start, find_start
from vllm_buddy.training.teacher import Teacher, check_top_logits
from vllm_buddy.training.token_fitter import TokenFitter, refit_router

DECISION_WIDTH = 32
ROUTER_DEPTHS = 5  # about as many depths are used to compare paths


def check_settings(settings: Stage1Settings) -> None:
    """Raise a BuddyError for any mistake that can be found before the model is looked at, and for missing packages."""
    check_packages()
    check_plotting()  # the curves are drawn when all is trained
    check_kv_policy(settings.kv_policy)
    if settings.paths not in (SEARCHED, LEARNED):
        check_static_method(settings.paths)
    if settings.paths == LEARNED:
        check_static_method(settings.prior)
    if settings.paths == SEARCHED and settings.recipe != "bypass":
        raise TrainingError("paths are searched for a bypass; for LoRA set paths to learned or to a static method")
    if settings.router_windows and settings.paths != SEARCHED:
        raise TrainingError("router_windows compares searched paths; set paths to searched")


def check_fits(settings: Stage1Settings, base: BaseModelIdentity, model_dir: Path) -> None:
    """Raise a BuddyError for settings that do not fit the model in `model_dir`."""
    if settings.length > (longest := load_config(model_dir).max_position_embeddings):
        raise TrainingError(f"length {settings.length} is beyond the model's {longest}")
    if missing := sorted(set(settings.token_depths) - set(range(MIN_DEPTH, base.num_layers))):
        raise TrainingError(
            f"token_depths: there is no path of {', '.join(map(str, missing))} layers; those of a model of "
            f"{base.num_layers} layers have {MIN_DEPTH} to {base.num_layers - 1}"
        )
    check_top_logits(settings.top_logits, base.vocab_size)
    if depth_for_budget(settings.min_budget, base.num_layers) == base.num_layers:
        raise TrainingError(
            f"min_budget {settings.min_budget:g} is all {base.num_layers} layers, so none is skipped; lower it"
        )
    check_described(settings, base)


def run_stage1(
    settings: Stage1Settings, model_dir: Path, report: Callable[[dict[str, Any]], None], note: Note
) -> tuple[Artifact, TrainingRun]:
    """Train, or continue a run that was stopped; returns the artifact, which is not saved yet, and the run.

    report: called with the log row of each step. note: called with a line of text about each other stage of the work.
    Of several processes, the main one calls them.

    Raises:
        BuddyError: settings, data or model cannot be used, the loss is not finite, or the disk is full.
    """
    check_settings(settings)
    base, weights = identify(model_dir, settings.base_model_id), weight_digest(model_dir)
    check_fits(settings, base, model_dir)
    origin = Origin.of(settings, base, weights)
    check_run_folder(settings.out, settings.start_from, origin.artifact)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {settings.out}: {error.strerror or error}") from None
    accelerator = make_accelerator()
    check_processes(settings, accelerator)
    note = note if accelerator.is_main_process else lambda _: None
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(model_dir)
    used = settings.tokens // settings.length
    drawn = max(used, settings.token_windows) if settings.schedule == "token" else used
    corpus = Corpus.read(settings.data, settings.data_dir, tokenizer, settings.length, drawn, settings.seed)
    token_windows = np.unique(corpus.order[: settings.token_windows])
    corpus = dataclasses.replace(corpus, order=corpus.order[:used])
    model: Any = load_base(settings, model_dir, accelerator)
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
    if settings.schedule == "token":
        observed = len(np.unique(main[1].order[len(main[1].order) // 2 :]))  # of which the last fit takes what is seen
        if (num := min(len(token_windows), observed)) < FEWEST_WINDOWS:
            raise TrainingError(
                f"the router of single tokens is fitted on {FEWEST_WINDOWS} sequences or more, and there are {num}; "
                "add text, or raise tokens and token_windows"
            )
    start = find_start(settings, base, origin, model, corpus, explored, teacher, accelerator, report, note)
    repair, frozen = _repair(settings, model, start)
    check_size((tuple(parameter.shape) for parameter in repair.parameters()), "the repair that is to be trained")
    smallest = depth_for_budget(settings.min_budget, base.num_layers)
    library = start.library(settings.library if settings.router_windows else 1, smallest)
    constant = LibraryRouting(
        base.num_layers, library, settings.route_every, settings.first_share, settings.full_prompt_share
    )
    routing: Routing = constant
    observations, fit, refit = None, None, None
    if settings.schedule == "token":
        assert teacher is not None
        with accelerator.main_process_first():  # the others would map a file that it makes longer
            begins = accelerator.is_main_process and not (settings.out / CHECKPOINT_FILE).is_file()
            num_rows = main[0].num_steps * settings.batch
            observations = Observations.open(settings.out, num_rows, settings.length, fresh=begins)
        fit = TokenFitter(settings, model, corpus, library, observations, note, origin.digest)
        router = fit.measured(start.bypass, teacher, token_windows).router
        by_token = TokenRouting(router, TokenSchedule(), constant)
        routing, refit = by_token, partial(refit_router, fit, by_token)
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
    artifact = trained_artifact(settings, base, start, repair, folded, library)
    if fit is not None:
        found = fit.observed(main[0].num_steps)
        run.router_figures = {"explained": dict(zip(map(str, settings.token_depths), found.explained))}
        artifact = with_token_router(artifact, found.router)
    if start.artifact is not None:
        artifact = with_kept(artifact, start.artifact, settings)
    return artifact, run


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
    bias = torch.from_numpy(standardised(prior)).float()
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
