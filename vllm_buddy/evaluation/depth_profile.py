"""Measures what drafts from fewer layers are worth: how often they are right, at which depth, and what they cost.

The model goes on greedily from passages of a text. At every position of what it wrote, each depth's path drafts as in
lossless mode (`method/draft_chains.py`). From that follow

- the share of chains of each length that are right, by depth;
- the earliest agreeing depth (EAD; DEX, arXiv 2606.29223): from which on all deeper paths say what the model says;
- tokens per cost of decoding with drafts of n-grams, of a depth, and of a depth where no n-gram is found, which walks
  through what the model wrote (`draft_walk.py`). Costs are weights read (`method/drafting.py`);
- what DEX would gain on several devices, one pipeline stage each (`dex.py`);
- what the adapters and paths of the artifact's draft exits are worth, where it has some.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vllm_buddy.artifact import Artifact, load_artifact, resolve_artifact
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.errors import EvaluationError
from vllm_buddy.evaluation.depth_profile_settings import DepthProfileSettings
from vllm_buddy.evaluation.dex import dex_row, ead_of_stages, earliest_agreeing
from vllm_buddy.evaluation.draft_walk import Drafts, Walk, ngram_drafts, walk
from vllm_buddy.importance.calibration import CalibrationText
from vllm_buddy.method import ExitAdapter, LayerPath, path_of
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.draft_chains import draft_chains, full_pass
from vllm_buddy.method.drafting import batch_share, pass_cost
from vllm_buddy.models.folder import load_config, load_model, load_tokenizer
from vllm_buddy.models.torch_device import find_device, torch_dtype

NUM_DEPTHS = 8
_PASSAGES_AT_ONCE = 8

# A path that drafts, the adapter of its exit, and the bypass of what it skips, each if there is one.
Exit = tuple[LayerPath, ExitAdapter | None, Bypass | None]


@dataclass(frozen=True)
class Profile:
    """Rows of each table, as they are written to the results file.

    depths: depth, cost, right (by length of the chain), ead (share of tokens with that earliest agreeing depth).
    speedups: batch, source, drafts, speedup. dex: devices, exit_stage, exit_speedup, exploration_speedup, ratio.
    exits: of each exit of the artifact, depth, and the share of chains of each length that are right: right,
        all_tokens, untrained, and of the library's path of the depth, library (None: it has none). The last two choose
        among all tokens too, with the bypass of each layer and no adapter.
    """

    about: dict[str, Any]
    depths: list[dict[str, Any]]
    speedups: list[dict[str, Any]]
    dex: list[dict[str, Any]]
    exits: list[dict[str, Any]]


def profile_depths(settings: DepthProfileSettings, model_dir: Path, report: Callable[[str, int, int], None]) -> Profile:
    """Measure and predict. report: called with (label, done, total).

    Raises:
        BuddyError: model, artifact, text or a depth cannot be used.
    """
    found = identify(model_dir)
    artifact = load_artifact(resolve_artifact(settings.artifact, lambda: found))
    artifact.require_base(found, EvaluationError)
    base = artifact.config.base_model
    exits = _exits(settings, artifact)
    costs = _costs(settings, model_dir, artifact, exits)
    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, torch_dtype(settings.dtype), find_device(settings.device))
    if artifact.lora is not None:
        artifact.lora.merge_into(model)
    text = CalibrationText.read(settings.text)
    num_tokens = settings.passages * settings.passage_tokens
    passages, _ = text.windows(tokenizer, settings.passage_tokens, num_tokens, skip=settings.text_skip)
    drafts = _drafted(settings, artifact, model, passages, exits, report)
    about = {
        "model": str(base.id),
        "artifact": artifact.config.name,
        "text": text.name,
        "text_skip": settings.text_skip,
        "dtype": settings.dtype,
        "positions": drafts.said[:, drafts.start :].numel(),
        "num_layers": base.num_layers,
        "row_cost": settings.row_cost,
        "costs_of": None if settings.shape_of is None else settings.shape_of.name,
    }
    return Profile(
        about,
        _depth_rows(drafts, costs, base.num_layers),
        _speedup_rows(settings, drafts, costs),
        [dex_row(ead_of_stages(drafts, k), k) for k in settings.devices],
        _exit_rows(drafts),
    )


def _exits(settings: DepthProfileSettings, artifact: Artifact) -> dict[int, Exit]:
    """By depth, what drafts there: the artifact's exit, or else the path of its library."""
    num_layers, bypass = artifact.config.base_model.num_layers, artifact.bypass
    trained = {draft.path.bit_count(): draft for draft in artifact.drafts}
    in_library = sorted(d for d in (artifact.config.library or range(MIN_DEPTH, num_layers)) if d < num_layers)
    known = sorted({*in_library, *trained})
    wanted = settings.depths
    if not wanted:
        low = min((d for d in known if d >= num_layers // 5), default=known[0])
        spread = [low + (known[-1] - low) * i / (NUM_DEPTHS - 1) for i in range(NUM_DEPTHS)]
        wanted = (*{min(known, key=lambda d, s=s: abs(d - s)) for s in spread}, *trained)  # type: ignore[misc]
    if missing := [depth for depth in wanted if depth not in known]:
        raise EvaluationError(f"there is no path of {missing} layers; known depths are {', '.join(map(str, known))}")
    exits: dict[int, Exit] = {}
    for depth in sorted({*wanted}):
        if depth in trained:
            exits[depth] = trained[depth].path, trained[depth].adapter, trained[depth].bypass or bypass
        elif (path := artifact.first_path(depth)) is not None:
            exits[depth] = path, None, bypass
    return exits


def _costs(
    settings: DepthProfileSettings, model_dir: Path, artifact: Artifact, exits: dict[int, Exit]
) -> dict[int, float]:
    """Of a draft pass of each depth, by the sizes of the model, or of the one named by shape_of."""
    base, bypass_rank = artifact.config.base_model, artifact.config.bypass_rank
    num_tokens = None if artifact.draft_vocabulary is None else len(artifact.draft_vocabulary)
    config = load_config(model_dir)
    if settings.shape_of is not None:
        config = load_config(settings.shape_of.parent if settings.shape_of.suffix == ".json" else settings.shape_of)
    trained = {draft.path.bit_count(): draft for draft in artifact.drafts}
    costs = {}
    for depth in exits:
        # Ranks grow with the width of the model, bypasses of layers with their number.
        layers = round(depth * config.num_hidden_layers / base.num_layers)
        ranks = (config.num_hidden_layers - layers) * bypass_rank
        if depth in trained:
            gaps, own = trained[depth].bypass, trained[depth].adapter.rank
            ranks = own + (ranks if gaps is None else len(gaps.down) * gaps.rank)
        ranks = ranks * config.hidden_size // base.hidden_size
        among = None if num_tokens is None else num_tokens * config.vocab_size // base.vocab_size
        costs[depth] = pass_cost(config, layers, ranks, among)
    return costs


@torch.no_grad()
def _drafted(
    settings: DepthProfileSettings,
    artifact: Artifact,
    model: Any,
    passages: torch.Tensor,
    exits: dict[int, Exit],
    report: Callable[[str, int, int], None],
) -> Drafts:
    num_layers, parts = artifact.config.base_model.num_layers, list[Any]()
    untrained: dict[int, list[Exit]] = {}
    for depth, (path, adapter, bypass) in exits.items():
        if adapter is not None:
            in_library = artifact.first_path(depth)
            untrained[depth] = [(path, adapter, bypass), (path, None, artifact.bypass)]
            untrained[depth] += [] if in_library is None else [(in_library, None, artifact.bypass)]
    stage_paths = {k: [_stage_path(num_layers, k, stage) for stage in range(1, k)] for k in settings.devices}
    for begin in range(0, len(passages), _PASSAGES_AT_ONCE):
        tokens = _written(model, passages[begin : begin + _PASSAGES_AT_ONCE], settings.tokens)
        said, full = full_pass(model, tokens)

        def draft(
            exit_: Exit,
            length: int,
            vocabulary: np.ndarray | None = None,
            tokens: torch.Tensor = tokens,
            full: Any = full,
        ) -> torch.Tensor:
            path, adapter, bypass = exit_
            return draft_chains(model, tokens, path, length, full, bypass, adapter, vocabulary)

        among = artifact.draft_vocabulary
        chains = {depth: draft(exit_, settings.drafts, among) for depth, exit_ in exits.items()}
        ends = {path: draft((path, None, artifact.bypass), 1)[0] for one in stage_paths.values() for path in one}
        stages = {k: torch.stack([ends[path] for path in of_one]) for k, of_one in stage_paths.items()}
        bare = {d: torch.stack([draft(exit_, settings.drafts) for exit_ in one]) for d, one in untrained.items()}
        by_key = ({key: one.cpu() for key, one in found.items()} for found in (chains, stages, bare))
        parts.append((tokens.cpu(), said.cpu(), *by_key))
        report("passages", begin + len(tokens), len(passages))
    tokens, said = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    chains = {depth: torch.cat([part[2][depth] for part in parts], dim=1) for depth in exits}
    stages = {k: torch.cat([part[3][k] for part in parts], dim=1) for k in stage_paths}
    both = {depth: list(torch.cat([part[4][depth] for part in parts], dim=2)) for depth in untrained}
    return Drafts(tokens, said, passages.shape[1] - 1, chains, stages, both)


def _written(model: nn.Module, passages: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The passages and what the model says after them, greedily: [num_passages, passage + num_tokens]."""
    from transformers import GenerationConfig

    net: Any = model
    passages = passages.to(net.device)
    # In the place of the model's own, which may have a repetition penalty: that is not what its layers say.
    net.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=0, max_new_tokens=num_tokens, min_new_tokens=num_tokens
    )
    return net.generate(passages, attention_mask=torch.ones_like(passages))


def _stage_path(num_layers: int, num_stages: int, stage: int) -> LayerPath:
    """The layers before the exit of a stage, the bypass of those after them, and the last layer before the head."""
    depth = max(MIN_DEPTH, round(num_layers * stage / num_stages))
    return path_of([*range(depth - 1), num_layers - 1])


def _right(drafts: Drafts, chain: torch.Tensor) -> list[float]:
    """[max_drafts], the share of positions from `start` on after which the first i + 1 drafts of a chain are right.

    The last positions, after which a chain would leave the text, are left out. chain: as in Drafts.chains.
    """
    n = drafts.said.shape[1] - drafts.start - len(chain)
    right = [
        chain[i, :, drafts.start + i : drafts.start + i + n] == drafts.said[:, drafts.start + i : drafts.start + i + n]
        for i in range(len(chain))
    ]
    shares = torch.stack(right).cummin(dim=0).values.float().mean(dim=(1, 2))
    return [round(float(share), 4) for share in shares]


def _exit_rows(drafts: Drafts) -> list[dict[str, Any]]:
    rows = []
    for depth, (all_tokens, bare, *library) in drafts.untrained.items():
        row = {"depth": depth, "right": _right(drafts, drafts.chains[depth])}
        row |= {"all_tokens": _right(drafts, all_tokens), "untrained": _right(drafts, bare)}
        rows.append({**row, "library": _right(drafts, library[0]) if library else None})
    return rows


def _depth_rows(drafts: Drafts, costs: dict[int, float], num_layers: int) -> list[dict[str, Any]]:
    ead = earliest_agreeing([drafts.chains[depth][0] for depth in costs], drafts.said)[:, drafts.start :]
    rows = []
    for number, (depth, cost) in enumerate(costs.items()):
        share = float((ead == number).float().mean())
        rows.append({"depth": depth, "cost": cost, "right": _right(drafts, drafts.chains[depth]), "ead": share})
    rest = float((ead == len(costs)).float().mean())
    longest = len(next(iter(drafts.chains.values())))
    return [*rows, {"depth": num_layers, "cost": 1.0, "right": [1.0] * longest, "ead": rest}]


def _speedup_rows(settings: DepthProfileSettings, drafts: Drafts, costs: dict[int, float]) -> list[dict[str, Any]]:
    ngrams = [
        [ngram_drafts(text[: p + 1], settings.ngram_min, settings.ngram_max, settings.drafts) for p in range(len(text))]
        for text in drafts.tokens.tolist()
    ]
    walks: list[tuple[str, int | None, int, Walk]] = [("n-gram", None, settings.drafts, walk(drafts, ngrams, None, 0))]
    for depth in costs:
        for source, looked_up in (("depth", None), ("n-gram, then depth", ngrams)):
            walks += [(source, depth, n, walk(drafts, looked_up, depth, n)) for n in range(1, settings.drafts + 1)]
    rows: list[dict[str, Any]] = []
    for batch in settings.batches:
        row_cost = settings.row_cost / batch_share(batch, settings.row_cost)
        best: dict[Any, dict[str, Any]] = {}
        for source, drafted_at, n, walked in walks:
            speedup = walked.speedup(costs.get(drafted_at or 0, 0.0), row_cost)
            known = best.get((source, drafted_at))
            if known is None or speedup > known["speedup"]:
                row = {"batch": batch, "source": source, "depth": drafted_at, "drafts": n, "speedup": round(speedup, 4)}
                best[source, drafted_at] = row
        rows += best.values()
    return rows
