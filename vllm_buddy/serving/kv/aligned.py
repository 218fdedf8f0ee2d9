"""Views on vLLM's own slots and lengths, for KV policies under which every position has an entry in every layer."""

import numpy as np

from vllm_buddy.serving.kv.base import KVPolicy, LayerView
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch


class Aligned(KVPolicy):
    """Position p of a request lies at position p of its block table in every layer. No state is kept."""

    def places(self, batch: StepBatch) -> RunPlaces:
        return RunPlaces(np.broadcast_to(batch.run_position.astype(np.int32), batch.run_mask.T.shape))

    def views(self, batch: StepBatch, places: RunPlaces) -> list[LayerView]:  # noqa: ARG002
        views: dict[bytes, LayerView] = {}
        result = []
        for mask in np.ascontiguousarray(batch.run_mask.T[self.stage]):
            key = mask.tobytes()
            if key not in views:
                views[key] = self._view(batch, mask)
            result.append(views[key])
        return result

    def _view(self, batch: StepBatch, runs: np.ndarray) -> LayerView:
        if runs.all():
            return LayerView()
        assert batch.slot_mapping is not None  # units are refused
        rows, skipped = batch.token_rows(runs), batch.to_device(batch.token_rows(~runs))
        skipped_slots = batch.slot_mapping.index_select(0, skipped)
        if len(rows) == 0:
            return LayerView(rows_np=rows, skipped=skipped, skipped_slots=skipped_slots)
        # One attention sequence per run, because the queries of a sequence must be its last positions, which those of a
        # run followed by a skipping run are not. Runs that follow each other are one: each sequence costs time.
        reqs, query_lens = batch.run_request[runs], batch.run_length[runs]
        seq_lens = batch.run_position[runs] + query_lens
        if len(batch.run_request) > len(batch.req_ids):
            chosen = np.flatnonzero(runs)
            starts = np.flatnonzero((np.diff(chosen, prepend=-2) > 1) | (np.diff(reqs, prepend=-1) > 0))
            last = np.append(starts[1:], len(chosen)) - 1
            reqs, query_lens, seq_lens = reqs[starts], np.add.reduceat(query_lens, starts), seq_lens[last]
        rows_device = batch.to_device(rows)
        slot_mapping = batch.slot_mapping.index_select(0, rows_device)
        tables = batch.tables(reqs, int(seq_lens.max()))
        metadata = batch.metadata(query_lens, seq_lens, tables, slot_mapping)
        return LayerView(rows, rows_device, metadata, slot_mapping, skipped, skipped_slots)
