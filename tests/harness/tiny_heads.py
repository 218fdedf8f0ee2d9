"""Makes draft heads for tiny models: EAGLE and EAGLE-3 checkpoints.

A head is a linear map of what it sees, and a decoder layer that adds nothing to it. That of EAGLE is fitted to the
model's states on random tokens, so it is right at times. That of EAGLE-3, where the newest token comes in by attention,
is random, and right by chance.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig

EAGLE, EAGLE3 = "eagle", "eagle3"
AUXILIARY_LAYERS = (2, 5, 8)  # of EAGLE-3; the last is the state after all layers of a tiny model

_NUM_SEQUENCES, _LENGTH = 64, 64
_RIDGE = 1e-2


def save_head(folder: Path, model: nn.Module, method: str) -> Path:
    """Write a head of a tiny model, as vLLM's --speculative-config takes it, and return `folder`.

    model: Hugging Face, fp32. method: EAGLE or EAGLE3.
    """
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim, num_kv = config.head_dim, config.num_key_value_heads
    generator = torch.Generator().manual_seed(0)
    linear = _fitted(model, generator) if method == EAGLE else torch.randn(hidden, 3 * hidden, generator=generator)
    taken = hidden if method == EAGLE else 2 * hidden
    layer = {
        "self_attn.q_proj": torch.zeros(heads * head_dim, taken),
        "self_attn.k_proj": torch.zeros(num_kv * head_dim, taken),
        "self_attn.v_proj": torch.zeros(num_kv * head_dim, taken),
        "self_attn.o_proj": torch.zeros(hidden, heads * head_dim),
        "mlp.gate_proj": torch.zeros(config.intermediate_size, hidden),
        "mlp.up_proj": torch.zeros(config.intermediate_size, hidden),
        "mlp.down_proj": torch.zeros(hidden, config.intermediate_size),
        "post_attention_layernorm": torch.ones(hidden),
    }
    weights = {"fc.weight": linear}
    if method == EAGLE3:
        layer |= {"input_layernorm": torch.ones(hidden), "hidden_norm": torch.ones(hidden)}
        weights["norm.weight"] = torch.ones(hidden)
    prefix = "layers.0" if method == EAGLE else "midlayer"
    weights |= {f"{prefix}.{name}.weight": weight for name, weight in layer.items()}
    folder.mkdir(parents=True)
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=1,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=num_kv,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        eagle_config={"eagle_aux_hidden_state_layer_ids": list(AUXILIARY_LAYERS)},
    ).save_pretrained(folder)
    return folder


@torch.inference_mode()
def _fitted(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
    """The map from a token's embedding and the last state before it to its own last state: [hidden, 2 * hidden]."""
    tokens = torch.randint(model.config.vocab_size, (_NUM_SEQUENCES, _LENGTH), generator=generator)
    last = model.model(tokens).last_hidden_state
    seen = torch.cat([model.get_input_embeddings()(tokens[:, 1:]), last[:, :-1]], dim=-1).flatten(0, 1)
    ridge = _RIDGE * torch.eye(seen.shape[1])
    return torch.linalg.solve(seen.T @ seen + ridge, seen.T @ last[:, 1:].flatten(0, 1)).T
