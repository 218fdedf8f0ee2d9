"""Makes small random models and artifacts: large enough to route, small enough to run in milliseconds.

The weights have a larger spread than a usual initialisation, so that greedy decoding has clear gaps between
the best and the second token and every skipped layer changes the tokens.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_buddy.artifact import Artifact, load_artifact, with_drafts, with_token_router
from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, LoraConfig, PredictorConfig, PriorConfig
from vllm_buddy.artifact.fingerprint import identify
from vllm_buddy.method import (
    BudgetPredictor,
    DecisionModule,
    DraftExit,
    ExitAdapter,
    FoldedDecision,
    FoldedPredictor,
    TokenRouter,
    path_of,
)
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.decision import value_table
from vllm_buddy.method.lora import LoraDeltas
from vllm_buddy.method.path import gap_starts

NUM_LAYERS = 8
HIDDEN_SIZE = 128
NUM_KV_HEADS = 2
HEAD_DIM = 32  # the smallest that vLLM's CPU attention accepts
VOCAB_SIZE = 512

PREDICTOR_DEPTHS = (3, 4, 6, 8)
TOKEN_DEPTHS = (4, 6)
PREDICTOR_PRICE = 8.0  # at which random prompts take every depth of the grid

_MATRIX_STD = 0.08
_EMBEDDING_STD = 0.5
_LM_HEAD_STD = 0.5
_BIAS_STD = 0.2

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (partial(MistralConfig, sliding_window=None), MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
FAMILIES = ("llama", "qwen2", "qwen3")  # those that every test of families runs; the rest has tests of its own


def save_tiny_model(
    folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Write a random model of `family`, a key of _FAMILIES, as a Hugging Face folder, and return `folder`.

    There is no tokenizer and no end-of-sequence token: engines need `skip_tokenizer_init=True` and generate as many
    tokens as they are asked for.

    changes: of the Hugging Face configuration.
    """
    config_class, model_class = _FAMILIES[family]
    usual = {
        "num_hidden_layers": NUM_LAYERS,
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": HIDDEN_SIZE // HEAD_DIM,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "intermediate_size": 2 * HIDDEN_SIZE,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    config = config_class(**(usual | changes))
    model = model_class(config)
    _randomise(model, seed)
    model.to(dtype).save_pretrained(folder)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the Hugging Face model in `folder`, for the reference."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def random_prompts(num: int, seed: int = 0, min_tokens: int = 3, max_tokens: int = 40) -> list[list[int]]:
    """Draw prompts of random token ids with lengths in [min_tokens, max_tokens]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(min_tokens, max_tokens + 1, num)
    return [rng.integers(0, VOCAB_SIZE, n).tolist() for n in lengths]


def random_artifact(
    folder: Path,
    model_dir: Path,
    seed: int = 0,
    *,
    decision: bool = True,
    paths_per_depth: int = 3,
    bypass_rank: int = 0,
    lora_rank: int = 0,
    predictor_depths: Sequence[int] = (),
    token_depths: Sequence[int] = (),
    draft_depths: Sequence[int] = (),
    draft_vocabulary: int = 0,
    draft_gaps: bool = False,
) -> Artifact:
    """Write an artifact for the model in `model_dir` into `folder`, and return it as loaded from there.

    decision: add a random Decision Module, with weights so large that paths differ between prompts and in one decoding.
    paths_per_depth: size of the path library at every depth below full; 0 for none.
    bypass_rank, lora_rank: rank of random bypasses, or of weight changes, that change every token; 0 for none.
    predictor_depths: grid of a random Budget Predictor; empty for none.
    token_depths: depths of nested random paths, without the full depth, and a random router of tokens; empty for none.
    draft_depths: depths of nested random exits for drafts, with adapters that change every token; empty for none.
    draft_vocabulary: number of random tokens that drafts choose among; 0: all.
    draft_gaps: whether the gaps of the exits' paths have random bypasses of their own.
    """
    base = identify(model_dir)
    num_middle = base.num_layers - 2
    rng = np.random.default_rng(seed)
    model = load_model(model_dir)
    values = value_table(model)
    folded = _random_decision(values, num_middle, seed) if decision else None
    bypass = _random_bypass(model, bypass_rank, seed) if bypass_rank else None
    lora = _random_lora(model, lora_rank, seed) if lora_rank else None
    predictor = random_predictor(values, predictor_depths, base.num_layers, seed) if predictor_depths else None
    token = random_token_router(values, token_depths, base.num_layers, seed) if token_depths else None
    config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name=folder.name,
        base_model=base,
        prior=PriorConfig(indicator="taylor", calibration="random", num_tokens=0),
        has_decision_module=decision,
        library=_random_library(rng, base.num_layers, paths_per_depth) if paths_per_depth else None,
        bypass_rank=bypass_rank,
        bypass_eps=0.0 if bypass is None else bypass.eps,
        lora=None if lora is None else LoraConfig(rank=lora_rank, alpha=lora.alpha),
        predictor=None if predictor is None else PredictorConfig(depths=predictor.depths, price=PREDICTOR_PRICE),
    )
    prior = rng.standard_normal(num_middle).astype(np.float32)
    artifact = Artifact(config, prior, folded, bypass, lora, predictor)
    artifact = artifact if token is None else with_token_router(artifact, token)
    if draft_depths:
        some = np.sort(rng.permutation(base.vocab_size)[:draft_vocabulary]) if draft_vocabulary else None
        artifact = with_drafts(artifact, random_exits(model, draft_depths, seed, gaps=draft_gaps), some)
    artifact.save(folder)
    return load_artifact(folder)


def random_exits(
    model: nn.Module, depths: Sequence[int], seed: int, rank: int = 4, *, gaps: bool = False
) -> list[DraftExit]:
    """Return exits of nested random paths, whose adapters and bypasses add about as much as the states have."""
    config: Any = model.config
    middle = np.random.default_rng(seed + 1).permutation(np.arange(1, config.num_hidden_layers - 1)).tolist()
    generator = torch.Generator().manual_seed(seed)
    exits = []
    for depth in depths:
        path = path_of([0, config.num_hidden_layers - 1, *middle[: depth - 2]])
        firsts = gap_starts(path)
        count = 1 + (len(firsts) if gaps else 0)
        down = torch.randn(count, rank, config.hidden_size, generator=generator) / config.hidden_size**0.5
        up = 4 * torch.randn(count, config.hidden_size, rank, generator=generator) / rank**0.5
        adapter = ExitAdapter(down[0], up[0], config.rms_norm_eps).rounded()
        own = Bypass(down[1:], up[1:], config.rms_norm_eps, firsts).rounded() if gaps else None
        exits.append(DraftExit(path, adapter, own))
    return exits


def _randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(_BIAS_STD * noise)
            elif "embed_tokens" in name:
                parameter.copy_(_EMBEDDING_STD * noise)
            elif "lm_head" in name:
                parameter.copy_(_LM_HEAD_STD * noise)
            else:
                parameter.copy_(_MATRIX_STD * noise)


def _random_decision(values: torch.Tensor, num_middle: int, seed: int) -> FoldedDecision:
    module = DecisionModule(values.shape[1], num_middle, hidden=16)
    _randomise_decision(module, values, seed)
    return FoldedDecision.fold(module, values)


def random_token_router(values: torch.Tensor, depths: Sequence[int], num_layers: int, seed: int) -> TokenRouter:
    """Return a router over nested random paths, at whose prices tokens differ in depth."""
    grid = (*depths, num_layers)
    middle = np.random.default_rng(seed).permutation(np.arange(1, num_layers - 1)).tolist()
    paths = tuple(path_of([0, num_layers - 1, *middle[: depth - 2]]) for depth in grid)
    predictor = random_predictor(values, grid, num_layers, seed + 1)
    return TokenRouter(predictor, paths, ((grid[0] / num_layers, 12.0), (1.0, 0.0)))


def random_predictor(values: torch.Tensor, depths: Sequence[int], num_layers: int, seed: int) -> FoldedPredictor:
    """Return a Budget Predictor with random weights. values: see value_table. depths: its grid."""
    predictor = BudgetPredictor(values.shape[1], depths, num_layers)
    _randomise_decision(predictor.module, values, seed)
    return FoldedPredictor.fold(predictor, values, num_layers)


def _randomise_decision(module: DecisionModule, values: torch.Tensor, seed: int) -> None:
    # A mean over n tokens varies 1/sqrt(n) as much as one token, so the context half gets the larger weight.
    scale = values.std(dim=0)
    value_dim = values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        w_mean, w_newest = module.w1.weight.chunk(2, dim=1)
        w_mean.mul_(4.0 / (scale * value_dim**0.5))
        w_newest.mul_(1.0 / (scale * value_dim**0.5))


def _random_bypass(model: nn.Module, rank: int, seed: int) -> Bypass:
    """Return bypasses whose contribution is about as large as a layer's."""
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(NUM_LAYERS - 2, rank, hidden, generator=generator) / hidden**0.5
    up = torch.randn(NUM_LAYERS - 2, hidden, rank, generator=generator) / rank**0.5
    return Bypass(down, up, model.config.rms_norm_eps)


def _random_lora(model: nn.Module, rank: int, seed: int) -> LoraDeltas:
    """Return changes of every projection of every other layer, including the projections that vLLM stacks."""
    generator = torch.Generator().manual_seed(seed)
    names = [n for n, m in model.model.layers.named_modules() if isinstance(m, nn.Linear) and int(n.split(".")[0]) % 2]
    a, b = {}, {}
    for name in (f"model.layers.{n}" for n in names):
        out_features, in_features = model.get_parameter(f"{name}.weight").shape
        a[name] = _MATRIX_STD * torch.randn(rank, in_features, generator=generator)
        b[name] = torch.randn(out_features, rank, generator=generator) / rank
    return LoraDeltas(a, b, alpha=1.0 * rank)


def _random_library(rng: np.random.Generator, num_layers: int, paths_per_depth: int) -> dict[int, list[list[int]]]:
    library: dict[int, list[list[int]]] = {}
    for depth in range(MIN_DEPTH, num_layers):
        sets: list[list[int]] = []
        # Near the ends there are fewer paths than asked for: 6 middle layers have only 6 sets of one.
        for _ in range(20 * paths_per_depth):
            layers = [0, *_sorted_sample(rng, num_layers, depth - 2), num_layers - 1]
            if layers not in sets:
                sets.append(layers)
            if len(sets) == paths_per_depth:
                break
        library[depth] = sets
    return library


def _sorted_sample(rng: np.random.Generator, num_layers: int, num_middle: int) -> Sequence[int]:
    return sorted(int(i) for i in rng.choice(np.arange(1, num_layers - 1), num_middle, replace=False))
