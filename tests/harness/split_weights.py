"""A model that is shared out among processes, in this process alone: weights that are not gathered are NaN."""

from typing import Any

import pytest
import torch
from torch import nn

from vllm_buddy.method import sharded


class SplitModel:
    """Splits `model`, which must not be used afterwards.

    lowest_elsewhere: the lowest layer that another process needs in its backward pass. log: what was gathered, in the
    order in which the gathering began; all processes must have the same. most: layers, embedding and head that were
    there or on their way at once, at most.
    """

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch, lowest_elsewhere: int = 1) -> None:
        net: Any = model
        self.log: list[str] = []
        self.most = 0
        self._here: set[str] = set()
        names = {"embedding": net.model.embed_tokens, "head": net.lm_head}
        names |= {f"layer {index}": layer for index, layer in enumerate(net.model.layers)}
        for name, module in names.items():
            self._split(name, module)
        sharded.set_layer_shards(model, net.model.layers)
        monkeypatch.setattr(sharded, "_largest", lambda value, device: max(value, -lowest_elsewhere))
        monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: None)

    @property
    def gathered(self) -> set[str]:
        """What is there or on its way."""
        return set(self._here)

    def _split(self, name: str, module: Any) -> None:
        kept = [parameter.detach().clone() for parameter in module.parameters()]

        def unshard(async_op: bool = False) -> None:
            if name not in self._here:
                self.log.append(name)
                self._here.add(name)
                self.most = max(self.most, len(self._here))
            if not async_op:
                # Through .data, because autograd would take a change of a weight that it has saved for a mistake.
                for parameter, whole in zip(module.parameters(), kept, strict=True):
                    parameter.data.copy_(whole)

        def reshard() -> None:
            self._here.discard(name)
            for parameter in module.parameters():
                parameter.data.fill_(torch.nan)

        module.unshard, module.reshard = unshard, reshard
        reshard()
