"""An artifact of a model of ten layers, each part that it may have, and changes to its saved files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from tests.harness.random_router import NUM_LAYERS, VOCAB_SIZE, random_decision
from vllm_buddy.artifact import CONFIG_FILE, WEIGHTS_FILE, Artifact
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, LoraConfig, PriorConfig
from vllm_buddy.artifact.fingerprint import BaseModelIdentity
from vllm_buddy.method import DecisionModule, DraftExit, ExitAdapter, FoldedDecision, path_of
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.lora import LoraDeltas
from vllm_buddy.method.path import gap_starts

BASE = BaseModelIdentity(
    id="tiny", architecture="LlamaForCausalLM", num_layers=NUM_LAYERS, hidden_size=8, vocab_size=VOCAB_SIZE,
    fingerprint="0123456789abcdef",
)  # fmt: skip
LIBRARY = {4: [[0, 1, 2, 9], [0, 1, 3, 9]], 5: [[0, 1, 2, 3, 9]]}
RANK = 3
EPS = 1e-5


def bypass() -> Bypass:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_LAYERS - 2, RANK, BASE.hidden_size)
    down, up = torch.randn(2, *shape, generator=generator).half().float()
    return Bypass(down, up.mT.contiguous(), EPS)


def lora() -> LoraDeltas:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 2, 2, 8, generator=generator).half().float()
    names = ("model.layers.3.self_attn.q_proj", "model.layers.0.mlp.down_proj")
    return LoraDeltas(dict(zip(names, a)), dict(zip(names, b.mT)), alpha=4.0)


def artifact(
    *,
    decision: bool | FoldedDecision = True,
    library: dict[int, list[list[int]]] | None = None,
    bypass: Bypass | None = None,
    lora: LoraDeltas | None = None,
) -> Artifact:
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name="round-trip",
        base_model=BASE,
        prior=PriorConfig(indicator="taylor", calibration="random", num_tokens=17),
        has_decision_module=bool(decision),
        library=library,
        bypass_rank=0 if bypass is None else bypass.rank,
        bypass_eps=0.0 if bypass is None else bypass.eps,
        lora=None if lora is None else LoraConfig(rank=lora.rank, alpha=lora.alpha),
    )
    prior = np.random.default_rng(0).standard_normal(NUM_LAYERS - 2).astype(np.float32)
    return Artifact(config, prior, random_decision() if decision is True else decision or None, bypass, lora)


def exits(*, rounded: bool = True, gaps: bool = False) -> list[DraftExit]:
    exits = []
    for seed, layers in enumerate(([0, 1, 4, 9], [0, 1, 4, 5, 9])):
        down, up = torch.randn(2, RANK, BASE.hidden_size, generator=torch.Generator().manual_seed(seed)).half().float()
        adapter = ExitAdapter(down, up.T.contiguous(), EPS)
        exit_ = DraftExit(path_of(layers), adapter.rounded() if rounded else adapter)
        if gaps:
            firsts = gap_starts(exit_.path)
            scales = torch.arange(1, len(firsts) + 1)[:, None, None]
            own = Bypass(scales * down, scales * up.T, EPS, firsts)
            exit_ = dataclasses.replace(exit_, bypass=own.rounded() if rounded else own)
        exits.append(exit_)
    return exits


def folded() -> FoldedDecision:
    torch.manual_seed(0)
    return FoldedDecision.fold(DecisionModule(5, NUM_LAYERS - 2, hidden=6), torch.randn(VOCAB_SIZE, 5))


def edit_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(raw | changes))


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    for name, array in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if array is not None:
            tensors[name] = array
    save_file(tensors, folder / WEIGHTS_FILE)
