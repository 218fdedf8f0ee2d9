"""What a run of stage 1 will take: memory by part, disk, and the time of its steps, measured on a few of them."""

import dataclasses
import re
import sys
import tempfile
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.training.corpus import Corpus
from vllm_buddy.training.frozen_base import base_bytes, check_processes, gathered_bytes, load_base, make_accelerator
from vllm_buddy.training.loop import TrainingRun
from vllm_buddy.training.out_folder import check_run_folder
from vllm_buddy.training.regression import fit_bypass
from vllm_buddy.training.repair import BypassRepair, LoraRepair, Repair
from vllm_buddy.training.routing import RandomRouting
from vllm_buddy.training.stage1 import check_fits, check_settings
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.start import starting_artifact, static_order
from vllm_buddy.training.teacher import BYTES_PER_LOGIT, Teacher

STEPS = 3  # the first one warms up
START_SEQUENCES = 4  # of the closed-form start: twice as many as are in memory at once
_FLOAT32 = 4
_STATUS = Path("/proc/self/status")
_STATES = 4  # float32 numbers for each trained one: itself, its gradient and two moments of AdamW


@dataclass(frozen=True)
class DryRun:
    """What a run takes.

    memory: bytes of each part that stays for a whole phase. start_peak, peak: bytes that the process had at most, in
    the closed-form start (0: there is none) and in training steps, activations included, on the device that trains.
    Outside Linux and CUDA, `peak` is the larger of both. disk: bytes of the full model's logits. tokens_per_second: of
    training steps on random paths, which of several processes the main one knows, nan in others. seconds: of all
    training steps; the closed-form start and the search for paths come on top.
    """

    memory: dict[str, int]
    start_peak: int
    peak: int
    disk: int
    tokens_per_second: float
    seconds: float


def dry_run(settings: Stage1Settings, model_dir: Path) -> DryRun:
    """Run a few training steps in a temporary folder and throw them away.

    Raises:
        BuddyError: as `run_stage1` would.
    """
    check_settings(settings)
    base = identify(model_dir, settings.base_model_id)
    check_fits(settings, base, model_dir)
    static_order(settings, base)
    check_run_folder(settings.out, settings.start_from, starting_artifact(settings, base))
    accelerator = make_accelerator()
    check_processes(settings, accelerator)
    tokenizer = load_tokenizer(model_dir)
    num_used = settings.tokens // settings.length
    corpus = Corpus.read(
        settings.data,
        settings.data_dir,
        tokenizer,
        settings.length,
        max(num_used, STEPS * settings.batch),
        settings.seed,
    )
    model: Any = load_base(settings, model_dir, accelerator)
    memory = {f"base weights ({settings.base_quantisation or settings.dtype})": base_bytes(model)}
    if settings.shard_base:
        memory = {
            f"base weights ({settings.dtype}), one of {accelerator.num_processes} shares": base_bytes(model),
            "base weights gathered for use, at most": gathered_bytes(model),
        }
    middle, hidden = base.num_layers - 2, base.hidden_size
    repair: Repair
    if settings.recipe == "bypass":
        down = torch.randn(middle, settings.rank, hidden, device=accelerator.device) / hidden**0.5
        up = torch.zeros(middle, hidden, settings.rank, device=accelerator.device)
        repair = BypassRepair(Bypass(down, up, model.config.rms_norm_eps))
    else:
        repair = LoraRepair(model, settings.rank, settings.lora_alpha)
    trained = sum(parameter.numel() for parameter in repair.parameters())
    memory["repair: weights, gradients, moments of AdamW"] = _STATES * _FLOAT32 * trained
    if settings.regresses:
        memory["closed-form start: three sums per layer"] = 3 * _FLOAT32 * middle * hidden**2
    disk = start_peak = 0
    if settings.regresses:
        windows = corpus.take(START_SEQUENCES * settings.length)
        fit_bypass(model, windows, settings.rank, checkpoint=settings.checkpoint_activations)
        start_peak = _peak_bytes(accelerator.device)
        _forget_peak(accelerator.device)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        few = settings.model_copy(update={"out": out, "tokens": STEPS * settings.batch * settings.length})
        teacher = None
        if settings.recipe != "paper":
            disk = len(np.unique(corpus.order[:num_used])) * settings.length * settings.top_logits * BYTES_PER_LOGIT
            corpus = dataclasses.replace(corpus, order=corpus.order[: STEPS * settings.batch])
            teacher = Teacher(model, corpus, settings.top_logits, out / "teacher")
        rows: list[dict[str, Any]] = []
        routing = RandomRouting(np.ones(middle))
        frozen = repair.disabled if isinstance(repair, LoraRepair) else nullcontext
        TrainingRun(few, corpus, model, repair, routing, teacher, accelerator, frozen, rows.append).train()
    speed = float(np.mean([row["tokens_per_second"] for row in rows[1:]])) if rows else float("nan")
    return DryRun(memory, start_peak, _peak_bytes(accelerator.device), disk, speed, settings.tokens / speed)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.is_file() and (found := re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())):
        return int(found.group(1)) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
