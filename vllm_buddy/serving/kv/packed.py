"""Views on the packed layout: in each layer a request's cache holds only the tokens that executed the layer.

They lie contiguously in the request's ordinary block table, or in that of the layer's KV unit. RoPE is already in K and
the order is kept, so causal attention over that layer's own length is attention masked by validity, on every stock
backend.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vllm_buddy.serving.kv.base import LayerView
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch


def packed_views(batch: StepBatch, places: RunPlaces, home_block: np.ndarray) -> list[LayerView]:
    """One view per layer. Layers whose runs have the same places share one.

    places, home_block: of these layers; see StepBatch.
    """
    runs_it = places.first_position >= 0
    keys = places.first_position
    if places.first_block is not None:
        keys = np.concatenate([keys, places.first_block * runs_it, home_block[:, None]], axis=1)
    distinct: dict[bytes, int] = {}
    view_of_layer = [distinct.setdefault(key, len(distinct)) for key in map(bytes, np.ascontiguousarray(keys))]
    views, own = [], []
    for layer in (view_of_layer.index(view) for view in range(len(distinct))):
        executes = runs_it[layer]
        if not executes.any():
            views.append(LayerView(rows_np=batch.token_rows(executes)))
            continue
        vllms = _vllms_view(batch, layer, places, home_block) if executes.all() else None
        if vllms is None:
            own.append(layer)
        views.append(vllms or LayerView())
    if own:
        all_slots = batch.layer_slots(places.of(own))
        for layer, slots in zip(own, all_slots):
            views[view_of_layer[layer]] = _own_view(batch, places.of([layer]), slots)
    return [views[view] for view in view_of_layer]


def _vllms_view(batch: StepBatch, layer: int, places: RunPlaces, home_block: np.ndarray) -> LayerView | None:
    """vLLM's own metadata, if it fits: every token so far executed the layer, and all requests have it in one unit."""
    if not np.array_equal(places.first_position[layer], batch.run_position):
        return None
    start = 0 if places.first_block is None else places.first_block[layer, 0]
    if places.first_block is not None and (places.first_block[layer] != start).any():
        return None
    if home_block[layer] == start:
        return LayerView()
    others = np.flatnonzero(home_block == start)
    return LayerView(metadata_of=int(others[0])) if len(others) else None


def _own_view(batch: StepBatch, places: RunPlaces, slots: torch.Tensor) -> LayerView:
    """A view with its own rows, lengths and slots. places: of one layer. slots: [num_tokens]."""
    executes = places.first_position[0] >= 0
    count = np.add.reduceat(batch.run_length * executes, batch.first_run)
    seq_lens = np.maximum.reduceat((places.first_position[0] + batch.run_length) * executes, batch.first_run)
    reqs = np.flatnonzero(count)
    first_block = None if places.first_block is None else places.first_block[0][batch.first_run][reqs]
    tables = batch.tables(reqs, int(seq_lens.max()), first_block)
    rows = None if executes.all() else batch.token_rows(executes)
    rows_device = None if rows is None else batch.to_device(rows)
    if rows_device is not None:
        slots = slots.index_select(0, rows_device)
    attended = count[reqs], seq_lens[reqs], tables
    return LayerView(rows, rows_device, batch.metadata(*attended, slots), slots, attended=attended)


def next_views(batch: StepBatch, places: RunPlaces, views: Sequence[LayerView]) -> list[LayerView] | None:
    """The views of a step in which every request decodes one token on its path, like in the step before it.

    Each layer that runs then writes the next slot and attends to one token more, in the same blocks.

    places: of this step. views: of the step before, in the same order of requests.

    Returns:
        None where a request begins a block in some layer.
    """
    if ((places.first_position >= 0) & (places.first_position % batch.block_size == 0)).any():
        return None
    following = {id(view): view if view.attended is None else _next_view(batch, view) for view in views}
    return [following[id(view)] for view in views]


def _next_view(batch: StepBatch, view: LayerView) -> LayerView:
    assert view.attended is not None
    assert view.slot_mapping is not None
    query_lens, seq_lens, tables = view.attended
    attended, slots = (query_lens, seq_lens + 1, tables), view.slot_mapping + 1
    return replace(view, attn_metadata=batch.metadata(*attended, slots), slot_mapping=slots, attended=attended)
