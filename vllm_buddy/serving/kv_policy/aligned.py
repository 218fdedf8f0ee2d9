"""Views for policies under which every position of every layer has an entry: vLLM's own slots and lengths."""

import numpy as np

from vllm_buddy.serving.kv_policy.base import KVPolicy, LayerView
from vllm_buddy.serving.step_batch import StepBatch


class Aligned(KVPolicy):
    """Position p of a request is at position p of its block table in every layer; no state is kept."""

    def views(self, batch: StepBatch) -> list[LayerView]:
        views: dict[bytes, LayerView] = {}
        result = []
        for mask in np.ascontiguousarray(batch.run_mask.T):
            key = mask.tobytes()
            if key not in views:
                views[key] = self._view(batch, mask)
            result.append(views[key])
        return result

    def _view(self, batch: StepBatch, runs: np.ndarray) -> LayerView:
        if runs.all():
            return LayerView()
        rows, skipped = batch.token_rows(runs), batch.to_device(batch.token_rows(~runs))
        skipped_slots = batch.slot_mapping[skipped]
        if len(rows) == 0:
            return LayerView(rows_np=rows, skipped=skipped, skipped_slots=skipped_slots)
        # A sequence per run: the queries of one attention sequence must be its last positions, and a run that is
        # followed by a skipping one is not.
        reqs = batch.run_request[runs]
        end = batch.run_start + batch.run_length - batch.query_start_loc[batch.run_request]
        seq_lens = batch.num_computed_tokens[reqs] + end[runs]
        num_blocks = int(-(-seq_lens.max() // batch.block_size))
        rows_device = batch.to_device(rows)
        slot_mapping = batch.slot_mapping[rows_device]
        metadata = batch.metadata(batch.run_length[runs], seq_lens, batch.block_table[reqs, :num_blocks], slot_mapping)
        return LayerView(rows, rows_device, metadata, slot_mapping, skipped, skipped_slots)
