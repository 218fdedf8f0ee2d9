"""The layers of a Hugging Face model, run one by one over a window of tokens with one path for all of them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class LayerStack:
    """Runs chosen layers of a Llama, Qwen2 or Qwen3 on windows of equal length.

    model: a causal language model; its own layer modules run, so any dtype and device will do.
    window: tokens per window.
    """

    def __init__(self, model: nn.Module, window: int) -> None:
        backbone: Any = model.model
        self._backbone = backbone
        self._lm_head: Any = model.lm_head
        weight = backbone.embed_tokens.weight
        self.device = weight.device
        self.num_layers = len(backbone.layers)
        self._positions = torch.arange(window, device=self.device)[None]
        # Hugging Face adds the mask to the logits; the lowest number, not -inf, is what it uses itself.
        lowest = torch.finfo(weight.dtype).min
        self._mask = torch.full((window, window), lowest, dtype=weight.dtype, device=self.device).triu(1)[None, None]
        self._embeddings = backbone.rotary_emb(weight[:1][None], self._positions)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [window] -> [1, window, hidden]."""
        return self._backbone.embed_tokens(token_ids[None].to(self.device))

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, window, hidden], through layer `index`."""
        return self._backbone.layers[index](
            hidden,
            attention_mask=self._mask,
            position_ids=self._positions,
            position_embeddings=self._embeddings,
        )

    def run(self, layers: Iterable[int], hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [1, window, hidden], through `layers` in the order given."""
        for index in layers:
            hidden = self.layer(index, hidden)
        return hidden

    def loss(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token cross-entropy, nats per token, of what left the last layer; float32 scalar."""
        logits = self._lm_head(self._backbone.norm(hidden))[0, :-1]
        return nn.functional.cross_entropy(logits.float(), token_ids[1:].to(self.device))
