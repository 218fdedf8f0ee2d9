"""Adds draft exits to an artifact, from settings to artifact: searches their paths and trains the exits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_buddy.artifact import Artifact, load_artifact, with_drafts
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.errors import TrainingError
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.draft_head import frequent_tokens
from vllm_buddy.models.folder import load_model, load_tokenizer
from vllm_buddy.models.torch_device import find_device, torch_dtype
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.draft_fit import DraftTeacher, Right, fit_exits, fit_gaps, measure
from vllm_buddy.training.draft_search import DraftCandidate, search_drafts
from vllm_buddy.training.draft_settings import DraftTrainingSettings
from vllm_buddy.training.out_folder import check_out
from vllm_buddy.training.teacher import check_top_logits


@dataclass(frozen=True)
class TrainedDrafts:
    """The artifact with its exits, and figures for the record of the run.

    searched: the best path of each depth that was considered. before, after: of each exit, on held-out text, before and
    after training: before, it has no adapter, and the bypass of each layer. sha256: hash of each source of text, by its
    name. all_tokens: as `after`, where drafts choose among all tokens.
    """

    artifact: Artifact
    searched: list[DraftCandidate]
    before: list[Right]
    after: list[Right]
    sha256: dict[str, str]
    all_tokens: list[Right]


def train_drafts(
    settings: DraftTrainingSettings,
    artifact_dir: Path,
    model_dir: Path,
    report: Callable[[dict[str, Any]], None],
    note: Callable[[str], None],
) -> TrainedDrafts:
    """Search draft paths and train their exits; the artifact is not saved yet.

    report: called with the log row of each training step. note: called with a line of text about other work.

    Raises:
        BuddyError: settings, data, artifact or model cannot be used, or a loss is not finite.
    """
    artifact = load_artifact(artifact_dir)
    base = artifact.config.base_model
    artifact.require_base(identify(model_dir), TrainingError)
    check_out(settings.out, artifact_dir, artifact, Artifact.without_drafts)
    wanted = [*settings.depths, *(() if settings.refine_depth is None else (settings.refine_depth,))]
    if wanted[-1] >= base.num_layers:
        raise TrainingError(f"drafts of {wanted[-1]} layers were asked for, the model has {base.num_layers}")
    check_top_logits(settings.top_logits, base.vocab_size)
    if settings.vocabulary is not None and settings.vocabulary >= base.vocab_size:
        raise TrainingError(
            f"drafts cannot choose among {settings.vocabulary} of the model's {base.vocab_size} tokens; lower "
            "vocabulary, or leave it out"
        )
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot make the folder {settings.out}: {error.strerror or error}") from None
    num_trained = settings.num_steps * settings.batch
    used = num_trained + settings.num_held_out
    corpus = Corpus.read(
        settings.data, settings.data_dir, load_tokenizer(model_dir), settings.length, used, settings.seed
    )
    trained, held_out = corpus.order[:num_trained], np.setdiff1d(corpus.order[num_trained:], corpus.order[:num_trained])
    if not len(held_out):
        raise TrainingError(
            f"training takes all {len(corpus.sequences)} sequences of the data, and none is left to hold out; lower "
            "tokens, or add text"
        )
    vocabulary = None
    if settings.vocabulary is not None:
        shares = [source.weight for source in settings.data]
        vocabulary = frequent_tokens(corpus.counts(shares, base.vocab_size, held_out), settings.vocabulary)
    model: Any = load_model(model_dir, torch_dtype(settings.dtype)).requires_grad_(False)
    if artifact.lora is not None:
        artifact.lora.merge_into(model)
    model.to(find_device("auto"))
    text = corpus.take(settings.search_tokens)
    searched = search_drafts(model, text, artifact, wanted, settings.row_cost, note, vocabulary)
    drafting = max((c for c in searched if c.depth in settings.depths), key=lambda c: c.gain)
    paths = [drafting.path, *(c.path for c in searched if c.depth == settings.refine_depth)]
    teacher, rest = DraftTeacher(model, settings.top_logits), corpus.sequences[held_out]
    before = measure(teacher, rest, [(path, artifact.bypass, None) for path in paths], vocabulary)
    starts: list[Bypass | None] = [None] * len(paths)
    if settings.gaps:
        note(f"computing the bypasses of gaps from {settings.init_tokens} tokens")
        first = trained[: -(-settings.init_tokens // settings.length)]
        starts = [*fit_gaps(model, torch.from_numpy(corpus.sequences[first].astype(np.int64)), settings.rank, paths)]
    note(f"training the exits of {', '.join(str(path.bit_count()) for path in paths)} layers")
    batches = [corpus.sequences[rows] for rows in trained.reshape(-1, settings.batch)]
    exits = fit_exits(teacher, batches, paths, starts, artifact.bypass, settings, report)
    trained_exits = [(draft.path, draft.bypass or artifact.bypass, draft.adapter) for draft in exits]
    after = measure(teacher, rest, trained_exits, vocabulary)
    all_tokens = after if vocabulary is None else measure(teacher, rest, trained_exits)
    made = with_drafts(artifact, exits, vocabulary)
    return TrainedDrafts(made, searched, before, after, corpus.sha256, all_tokens)
