"""The interface of a KV policy: where each run writes, and the view of the KV cache that each layer gets."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from vllm_buddy.method.kv_policy import KVPolicyName
from vllm_buddy.method.kv_units import KVUnits
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch


@dataclass(frozen=True, eq=False)
class SeqLengths:
    """Lengths of the sequences of a view, each [num_seqs]: tokens to compute, and tokens to attend to, these included.

    Views of equal lengths hold the same object.
    """

    query_lens: np.ndarray
    seq_lens: np.ndarray

    def later(self, num_tokens: int) -> "SeqLengths":
        """The lengths when each sequence has decoded num_tokens more."""
        return SeqLengths(self.query_lens, self.seq_lens + num_tokens) if num_tokens else self


@dataclass
class LayerView:
    """What one layer runs on in one step. Layers that run the same rows on equal lengths in the same blocks share one.

    rows_np, rows: [num_rows] token rows that execute the layer, ascending, on the host and on the device; None: all
        rows. Empty: no row executes it.
    attn_metadata, slot_mapping: for these rows; None: vLLM's own for the whole batch.
    skipped: rows that do not execute the layer, on the device; see skipped_rows.
    skipped_slots: the slots that these rows write in this layer's cache all the same; None: they write nothing.
    lengths, tables: with attn_metadata that the next step may follow from, what it was made of, see StepBatch.metadata.
    """

    rows_np: np.ndarray | None = None
    rows: torch.Tensor | None = None
    attn_metadata: Any = None
    slot_mapping: torch.Tensor | None = None
    skipped: torch.Tensor | None = None
    skipped_slots: torch.Tensor | None = None
    lengths: SeqLengths | None = None
    tables: torch.Tensor | None = None
    _source: torch.Tensor | None = None

    @classmethod
    def empty(cls) -> "LayerView":
        """That of a layer which no row executes."""
        return cls(rows_np=np.empty(0, dtype=np.int64))

    @property
    def is_empty(self) -> bool:
        """Whether no row executes the layer."""
        return self.rows_np is not None and len(self.rows_np) == 0

    def skipped_rows(self, hidden: torch.Tensor) -> torch.Tensor:
        """`skipped`, computed on first use if the policy has not set it. hidden: [num_tokens, any]."""
        if self.skipped is None:
            skips = np.ones(len(hidden), dtype=bool)
            skips[self.rows_np] = False
            self.skipped = torch.from_numpy(np.flatnonzero(skips)).to(hidden.device, non_blocking=True)
        return self.skipped

    def source(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens] int32, the place of each token in `rows`, or -1 where it skips the layer; made on first use.

        hidden: [num_tokens, any].
        """
        assert self.rows is not None
        if self._source is None:
            self._source = torch.full((len(hidden),), -1, dtype=torch.int32, device=hidden.device)
            places = torch.arange(len(self.rows), dtype=torch.int32, device=hidden.device)
            self._source.index_copy_(0, self.rows, places)
        return self._source


class KVPolicy(ABC):
    """Turns a step into one view per layer.

    num_layers: of the whole model.
    shares_blocks: whether requests may share KV blocks, through vLLM's prefix cache.
    stage: the layers that this worker runs, of the whole model; all without pipeline parallelism.
    units: of the KV cache; None in the dense layout, the only one for policies that write every layer.
    writes_skipped: whether a skipped layer leaves entries of its own, see write_skipped.
    in_graphs: whether its decode steps can be captured. Rows that skip a layer may then run through it, and write
        where `places` says.
    """

    name: ClassVar[KVPolicyName]
    writes_skipped: ClassVar[bool]
    in_graphs: ClassVar[bool]

    def __init__(
        self,
        num_layers: int,
        shares_blocks: bool = True,
        stage: slice = slice(None),
        units: KVUnits | None = None,
    ) -> None:
        self.num_layers = num_layers
        self.shares_blocks = shares_blocks
        self.stage = stage
        self.units = units

    @property
    def moves_first_blocks(self) -> bool:
        """Whether a layer's part of a request may start after the first block of its block table."""
        return False

    def forget(self, req_id: str) -> None:  # noqa: B027 - most policies keep nothing
        """Drop what is kept of a finished request."""

    @abstractmethod
    def places(self, batch: StepBatch) -> RunPlaces:
        """Where each run of the step writes its K and V in every layer. Advances the state kept of the requests."""

    @abstractmethod
    def views(self, batch: StepBatch, places: RunPlaces) -> list[LayerView]:
        """One view per layer of the stage. places: of all layers, in this step."""

    def write_skipped(self, layer: Any, positions: Any, hidden: Any, residual: Any, slots: Any) -> None:
        """Write what rows that skip a layer leave in its cache, before other rows attend to it.

        layer: the vLLM decoder layer. positions, slots: [num_rows]; hidden, residual: [num_rows, hidden_size], which
        are not changed. The state of a row is hidden + residual, or hidden where residual is None.
        """
        raise NotImplementedError(f"KV policy {self.name} writes nothing for skipped layers")
