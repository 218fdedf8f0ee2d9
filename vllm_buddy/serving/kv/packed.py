"""Views on the packed layout: in each layer a request's cache holds only the tokens that executed the layer.

They lie contiguously in the request's ordinary block table, or in that of the layer's KV unit. RoPE is already in K and
the order is kept, so causal attention over that layer's own length is attention masked by validity, on every stock
backend.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vllm_buddy.serving.kv.base import LayerView, SeqLengths
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch


@dataclass
class PackedViews:
    """The views of one step, with what those of the next one follow from.

    views: one per layer. own: those that have slots and metadata of their own, each once.
    slots: of `own`, one behind the other; None: there are none.
    room: how many more tokens each request can decode on its path before one begins a block in a layer of `own`.
    """

    views: list[LayerView]
    own: list[LayerView]
    slots: torch.Tensor | None
    room: int


def packed_views(batch: StepBatch, places: RunPlaces) -> PackedViews:
    """The views of any step. Layers whose runs have the same places share one. places: of these layers."""
    runs_it = places.first_position >= 0
    keys = places.first_position
    if places.first_block is not None:
        keys = np.concatenate([keys, places.first_block * runs_it], axis=1)
    distinct: dict[bytes, int] = {}  # the first layer of each view
    first_layer = [distinct.setdefault(key, layer) for layer, key in enumerate(map(bytes, np.ascontiguousarray(keys)))]
    views: dict[int, LayerView] = {}
    own: list[int] = []
    for layer in distinct.values():
        if not runs_it[layer].any():
            views[layer] = LayerView.empty()
        elif _is_vllms(batch, layer, places):
            views[layer] = LayerView()
        else:
            own.append(layer)
    if not own:
        return PackedViews([views[layer] for layer in first_layer], [], None, 0)
    made, slots = _own_views(batch, places.of(own))
    views |= zip(own, made)
    last = np.where(runs_it[own], places.first_position[own] + batch.run_length - 1, 0)
    room = batch.block_size - 1 - int((last % batch.block_size).max())
    return PackedViews([views[layer] for layer in first_layer], made, slots, room)


def _is_vllms(batch: StepBatch, layer: int, places: RunPlaces) -> bool:
    """Whether vLLM's own metadata fits: every token so far executed the layer. With KV units vLLM makes none."""
    if batch.units is not None or not np.array_equal(places.first_position[layer], batch.run_position):
        return False
    return places.first_block is None or not places.first_block[layer].any()


def _own_views(batch: StepBatch, places: RunPlaces) -> tuple[list[LayerView], torch.Tensor]:
    """Views with rows, lengths and slots of their own, and their slots. places: of the layers that get one."""
    runs_it = places.first_position >= 0
    count = np.add.reduceat(batch.run_length * runs_it, batch.first_run, axis=1)
    seq_lens = np.maximum.reduceat((places.first_position + batch.run_length) * runs_it, batch.first_run, axis=1)
    num_runs: list[int] = runs_it.sum(axis=1).tolist()
    most_tokens: list[int] = seq_lens.max(axis=1).tolist()
    rows_of: dict[bytes, tuple[np.ndarray, torch.Tensor]] = {}
    lengths_of: dict[bytes, SeqLengths] = {}
    views, slots = [], []
    for layer, own_slots in enumerate(batch.layer_slots(places)):
        reqs: np.ndarray | None = None
        rows_np: np.ndarray | None = None
        rows: torch.Tensor | None = None
        lengths = SeqLengths(count[layer], seq_lens[layer])
        first_block = None if places.first_block is None else places.first_block[layer, batch.first_run]
        if num_runs[layer] < len(batch.run_length):
            if (key := runs_it[layer].tobytes()) not in rows_of:
                own_rows = batch.token_rows(runs_it[layer])
                rows_of[key] = own_rows, batch.to_device(own_rows)
            rows_np, rows = rows_of[key]
            reqs = np.flatnonzero(count[layer])
            lengths = SeqLengths(count[layer, reqs], seq_lens[layer, reqs])
            first_block = None if first_block is None else first_block[reqs]
            own_slots = own_slots.index_select(0, rows)
        lengths = lengths_of.setdefault(lengths.query_lens.tobytes() + lengths.seq_lens.tobytes(), lengths)
        tables = batch.tables(reqs, most_tokens[layer], first_block)
        slots.append(own_slots)
        views.append(LayerView(rows_np, rows, slot_mapping=own_slots, lengths=lengths, tables=tables))
    all_slots = torch.cat(slots)
    return _on_slots(batch, views, all_slots), all_slots


def _on_slots(batch: StepBatch, views: Sequence[LayerView], slots: torch.Tensor, num_later: int = 0) -> list[LayerView]:
    """The views on these slots, with metadata. Of views of equal lengths it is built once, and differs in blocks only.

    slots: of all views, in place of those they have. num_later: by how many decoded tokens each sequence is longer.
    """
    made: dict[SeqLengths, tuple[SeqLengths, Any]] = {}
    result = []
    num_slots = [len(view.slot_mapping) for view in views if view.slot_mapping is not None]
    for view, own_slots in zip(views, slots.split(num_slots), strict=True):
        assert view.lengths is not None
        assert view.tables is not None
        if view.lengths in made:
            lengths, metadata = made[view.lengths]
            metadata = batch.move_metadata(metadata, view.tables, own_slots)
        else:
            lengths = view.lengths.later(num_later)
            metadata = batch.metadata(lengths.query_lens, lengths.seq_lens, view.tables, own_slots)
            made[view.lengths] = lengths, metadata
        result.append(replace(view, attn_metadata=metadata, slot_mapping=own_slots, lengths=lengths))
    return result


def next_views(batch: StepBatch, last: PackedViews) -> PackedViews | None:
    """The views of a step in which every request decodes one token on its path, like in the step before it.

    Each layer that runs then writes the next slot and attends to one token more, in the same blocks.

    last: the step before, with the same order of requests.

    Returns:
        None where a request begins a block in some layer.
    """
    if last.slots is None:
        return last
    if last.room == 0:
        return None
    slots = last.slots + 1
    own = _on_slots(batch, last.own, slots, num_later=1)
    by_id = {id(before): view for before, view in zip(last.own, own)}
    return PackedViews([by_id.get(id(view), view) for view in last.views], own, slots, last.room - 1)
