"""Users' LoRA adapters (`--enable-lora`) where a layer runs a part of the batch's rows.

vLLM's LoRA layers ask a Punica wrapper, which all of them share, for the adapter of each row of the batch. Its class is
changed so that they can be told which rows of the batch a layer has got.
"""

from collections.abc import Callable
from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class RoutedAdapters(PunicaWrapperCPU):
    """vLLM's PunicaWrapperCPU for rows that a layer has got.

    Rows without an adapter are left out of the products. vLLM 0.32 marks them with -1, by which its CPU products index
    the stacked adapters, so that such a row gets the adapter of the last slot.
    """

    is_prefill: bool
    # Indices of the batch's rows that the layer at work has got, [num_rows]; None: all of them, in order.
    buddy_rows: torch.Tensor | None = None
    # Index in the batch of the request of whose prompt logits are computed; None: a row for each request of the batch.
    buddy_prompt: int | None = None
    _buddy_slots: torch.Tensor | None = None  # of the rows of one product that have an adapter

    @property
    def token_lora_indices(self) -> torch.Tensor:
        """Slot of the adapter of each row of the product at hand."""
        return super().token_lora_indices if self._buddy_slots is None else self._buddy_slots

    @property
    def sampler_indices(self) -> torch.Tensor:
        """The same, of rows whose logits are computed."""
        return super().sampler_indices if self._buddy_slots is None else self._buddy_slots

    def add_lora_linear(
        self, y: torch.Tensor, x: torch.Tensor, lora_a_stacked: Any, lora_b_stacked: Any, *args: Any, **kwargs: Any
    ) -> None:
        """vLLM's, on the rows that have an adapter. y: [num_rows, out_features], changed in place; x: its input."""
        slots = super().token_lora_indices
        slots = slots if self.buddy_rows is None else slots.index_select(0, self.buddy_rows)
        add = super().add_lora_linear
        self._add(y, x, slots, lambda y, x: add(y, x, lora_a_stacked, lora_b_stacked, *args, **kwargs))

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, *args: Any, **kwargs: Any
    ) -> None:
        """vLLM's, on the rows that have an adapter. y: [num_rows, hidden], changed in place; x: [num_rows, rank]."""
        add = super().add_lora_embedding
        self._add(y, x, super().token_lora_indices, lambda y, x: add(y, x, lora_b_stacked, *args, **kwargs))

    def add_lora_logits(self, y: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """vLLM's, on the rows that have an adapter. y: [num_rows, vocab], changed in place; x: [num_rows, hidden]."""
        add, slots = super().add_lora_logits, super().sampler_indices
        if self.buddy_prompt is not None:
            slots = slots[self.buddy_prompt].expand(len(x))
        self._add(y, x, slots, lambda y, x: add(y, x, *args, **kwargs))

    def _add(
        self, y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Call `add(y, x)` on the rows of y and x whose slot is one; y is changed in place."""
        rows = (slots >= 0).nonzero()[:, 0]
        if len(rows) == 0:
            return
        whole_batch, self.is_prefill = self.is_prefill, False  # the products that take a slot for each row
        self._buddy_slots = slots[rows]
        try:
            adapted = y.index_select(0, rows)
            add(adapted, x.index_select(0, rows))
            y.index_copy_(0, rows, adapted)
        finally:
            self._buddy_slots, self.is_prefill = None, whole_batch


def routed_adapters(model_runner: Any) -> RoutedAdapters | None:
    """Change the class of a model runner's Punica wrapper, in place, and return it; None without `--enable-lora`.

    model_runner: vLLM's model runner V1, with its model loaded.
    """
    manager = getattr(model_runner, "lora_manager", None)
    if manager is None:
        return None
    (wrapper,) = set(manager._adapter_manager.punica_wrapper_mapping.values())
    wrapper.__class__ = RoutedAdapters
    return wrapper
