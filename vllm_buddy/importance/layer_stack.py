"""Runs the layers of a Hugging Face model one by one on a window of tokens that all have the same path."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_ROWS = 128  # positions whose logits are in memory at once


class LayerStack:
    """Runs chosen layers of a Llama, Mistral, Qwen2 or Qwen3 on windows of equal length.

    model: a causal language model, of any dtype and on any device, because its own layer modules run.
    window: number of tokens per window.
    """

    def __init__(self, model: nn.Module, window: int) -> None:
        backbone: Any = model.model
        self._backbone = backbone
        self._lm_head: Any = model.lm_head
        weight = backbone.embed_tokens.weight
        self.device = weight.device
        self.num_layers = len(backbone.layers)
        self._positions = torch.arange(window, device=self.device)[None]
        # Hugging Face adds the mask to the logits, and uses the lowest number instead of -inf.
        lowest = torch.finfo(weight.dtype).min
        self._mask = torch.full((window, window), lowest, dtype=weight.dtype, device=self.device).triu(1)[None, None]
        self._embeddings = backbone.rotary_emb(weight[:1][None], self._positions)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [1, window, hidden] of token_ids [window]."""
        return self._backbone.embed_tokens(token_ids[None].to(self.device))

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run layer `index` on hidden: [1, window, hidden]."""
        return self._backbone.layers[index](
            hidden,
            attention_mask=self._mask,
            position_ids=self._positions,
            position_embeddings=self._embeddings,
        )

    def run(self, layers: Iterable[int], hidden: torch.Tensor) -> torch.Tensor:
        """Run `layers` in the given order on hidden: [1, window, hidden]."""
        for index in layers:
            hidden = self.layer(index, hidden)
        return hidden

    def loss(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """Return the mean next-token loss in nats per token, a float32 scalar. hidden: output of the last layer."""
        return torch.stack(list(self.loss_parts(hidden, token_ids))).sum() / (len(token_ids) - 1)

    def loss_parts(self, hidden: torch.Tensor, token_ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the next-token loss of some positions after others, summed; each is computed when it is asked for.

        Logits of a part are not kept for the backward pass but computed again there.
        """
        states, targets = hidden[0, :-1], token_ids[1:].to(self.device)
        for part in (slice(start, start + _ROWS) for start in range(0, len(states), _ROWS)):
            if torch.is_grad_enabled():
                yield checkpoint(self._summed_loss, states[part], targets[part], use_reentrant=False)
            else:
                yield self._summed_loss(states[part], targets[part])

    def _summed_loss(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self._lm_head(self._backbone.norm(states))
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
