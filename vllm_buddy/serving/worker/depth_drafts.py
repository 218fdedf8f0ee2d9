"""The drafter of lossless mode: n-grams of the request first, then drafts from the model's own layers.

vLLM's method `custom_class` calls it after each step, with the tokens that the step sampled. It returns drafts, which
vLLM's scheduler adds to the next step. There all layers check them, and vLLM's rejection sampler keeps the distribution
of the full model: drafts are greedy, so to the sampler each is one token with certainty.

A draft pass runs the newest token along a short path of the model, on the request's own KV cache. The cache holds K and
V of all layers for all tokens before, because a lossless request runs at full depth. The pass writes K and V of the
draft into the slots after them, in the layers of the path. A trained exit of the artifact has a bypass for each gap of
the path and an adapter after its last layer. Then come the model's own last norm and head, of all tokens or of frequent
ones alone (`draft_tokens.py`). The step that checks the draft writes all layers' K and V there, and what lies beyond
the accepted tokens is written again before anything reads it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context

from vllm_buddy.artifact import load_artifact
from vllm_buddy.method import LayerPath, Run
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.serving.forward.bypasses import bypass_calls
from vllm_buddy.serving.forward.compiled import LayerFn
from vllm_buddy.serving.kv import LayerView
from vllm_buddy.serving.schedule.draft_pace import DraftPass, DraftPasses
from vllm_buddy.serving.schedule.plan import RequestPlan
from vllm_buddy.serving.start.settings import engine_settings
from vllm_buddy.serving.worker.batch import StepBatch
from vllm_buddy.serving.worker.draft_tokens import Likeliest, likeliest_of


class DepthDrafts:
    """A drafter for vLLM's `--speculative-config`, with method custom_class."""

    def __init__(self, vllm_config: Any) -> None:
        settings = engine_settings(vllm_config)
        self._vllm_config = vllm_config
        self._most: int = vllm_config.speculative_config.num_speculative_tokens
        self._drafts = DraftPasses.of(
            settings, load_artifact(settings.artifact_folder), vllm_config.model_config.hf_text_config
        )
        self._ngrams = _ngram_proposer(vllm_config, settings.drafts.ngram_min, settings.drafts.ngram_max)
        self._model: Any = None
        self._likeliest: Likeliest
        self._functions: dict[LayerPath, _PassFunctions] = {}  # of the passes that were used, by path
        self._runner: Any = None

    def load_model(self, model: Any) -> None:
        """Take the target model, which drafts too."""
        self._model = model
        self.use(self._drafts)

    def use(self, drafts: DraftPasses) -> None:
        """Draft on these layers, and among these tokens, from now on."""
        self._drafts = drafts.to(self._model.model.norm.weight)
        self._likeliest = likeliest_of(self._model, drafts.vocabulary)
        for each in (self._drafts.drafting, self._drafts.refining):
            if each is not None and each.path not in self._functions:
                self._functions[each.path] = _PassFunctions.of(each, self._vllm_config)

    def attach(self, runner: Any) -> None:
        """Take the model runner, whose KV cache and block tables drafts use."""
        self._runner = runner

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,  # noqa: ARG002 - of the step that is over
    ) -> list[list[int]]:
        """Drafts for each request, [num_reqs] lists of up to num_speculative_tokens token ids.

        sampled_token_ids: tokens sampled in the last step, none where a prompt is not complete.
        num_tokens_no_spec: [num_reqs], tokens of each request, the sampled ones included.
        token_ids_cpu: [num_reqs, max_model_len].
        """
        if not sampled_token_ids:
            return []
        num_reqs = len(sampled_token_ids)
        req_ids = self._runner.input_batch.req_ids[:num_reqs]
        ngrams, wanted = zip(*self._runner.buddy_state.wanted_drafts(req_ids))
        drafts: list[list[int]] = [[] for _ in range(num_reqs)]
        if self._ngrams is not None and any(ngrams):
            asking = [sampled if n else [] for sampled, n in zip(sampled_token_ids, ngrams)]
            found = self._ngrams.propose(self._most, asking, num_tokens_no_spec, token_ids_cpu)
            drafts = [tokens[:n] for tokens, n in zip(found, ngrams)]
        rows = [row for row in range(num_reqs) if wanted[row] and sampled_token_ids[row] and not drafts[row]]
        if 2 * len(rows) < np.count_nonzero(wanted) or not rows:
            return drafts  # a pass costs what it costs for all that wanted it, and n-grams were found for most
        positions = num_tokens_no_spec[rows].astype(np.int64) - 1  # of the newest token, which no pass has run yet
        newest = token_ids_cpu[rows, positions].tolist()
        for row, chain in zip(rows, self._chains(rows, positions, newest, [wanted[row] for row in rows])):
            drafts[row] = chain
        return drafts

    @torch.inference_mode()
    def _chains(
        self, rows: Sequence[int], positions: np.ndarray, newest: Sequence[int], lengths: Sequence[int]
    ) -> list[list[int]]:
        """Draft lengths[i] tokens after token newest[i], at positions[i] of the request in batch row rows[i]."""
        drafts = self._drafts
        chains: list[list[int]] = [[] for _ in rows]
        for step in range(max(lengths)):
            active = [i for i, length in enumerate(lengths) if length > step]
            inputs = [[(newest[i], *chains[i])[-1]] for i in active]
            places = positions[active] + step
            outputs = self._run(drafts.drafting.path, [rows[i] for i in active], places, inputs)
            for i, (token,) in zip(active, outputs):
                chains[i].append(token)
        if drafts.refining is None:
            return chains
        inputs = [[token, *chain] for token, chain in zip(newest, chains)]
        checked = self._run(drafts.refining.path, rows, positions, inputs)
        return [_refined(chain, says)[: self._most] for chain, says in zip(chains, checked)]

    def _run(
        self, path: LayerPath, rows: Sequence[int], positions: np.ndarray, token_ids: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """The most likely token after each of token_ids[i], which follow each other from positions[i] on."""
        batch = self._batch(path, rows, positions, [len(tokens) for tokens in token_ids])
        state, backbone = self._runner.buddy_state, self._model.model
        views = self._views(batch, path)
        inputs = batch.to_device(np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in token_ids]))
        places = np.concatenate([start + np.arange(len(tokens)) for start, tokens in zip(positions, token_ids)])
        own = self._functions[path]
        step = state.drafting_step(batch, views, own.bypasses, own.adapter)
        with set_forward_context({}, self._vllm_config, num_tokens=batch.num_tokens, slot_mapping={}):
            hidden: Any = step.forward(backbone, inputs, batch.to_device(places), None)
        said = self._likeliest(hidden).tolist()
        return [said[start:end] for start, end in pairwise(batch.query_start_loc)]

    def _batch(self, path: LayerPath, rows: Sequence[int], positions: np.ndarray, lengths: Sequence[int]) -> StepBatch:
        """A pass of its own: of some requests of the batch, each with lengths[i] tokens from positions[i] on."""
        state, input_batch = self._runner.buddy_state, self._runner.input_batch
        table = input_batch.block_table[0].get_device_tensor(input_batch.num_reqs)
        device = table.device
        table = table.index_select(0, torch.tensor(rows, device=device))
        query_start_loc = np.concatenate([[0], np.cumsum(lengths)])
        places = np.concatenate([start + np.arange(length) for start, length in zip(positions, lengths)])
        owner = torch.from_numpy(np.repeat(np.arange(len(rows)), lengths)).to(device)
        blocks = table[owner, torch.from_numpy(places // state.block_size).to(device)].to(torch.int64)
        slots = blocks * state.block_size + torch.from_numpy(places % state.block_size).to(device)
        return state.batch(
            req_ids=[input_batch.req_ids[row] for row in rows],
            plans=[RequestPlan((Run(length, path),), None) for length in lengths],
            query_start_loc=query_start_loc,
            num_computed_tokens=positions,
            block_table=table,
            slot_mapping=slots,
        )

    @staticmethod
    def _views(batch: StepBatch, path: LayerPath) -> list[LayerView]:
        """All rows run the layers of the path, at their positions; in the others they go through the bypass."""
        assert batch.slot_mapping is not None  # units are refused
        lengths = np.diff(batch.query_start_loc)
        ends = batch.num_computed_tokens + lengths
        tables = batch.tables(None, int(ends.max()))
        metadata = batch.metadata(lengths, ends, tables, batch.slot_mapping)
        runs = LayerView(attn_metadata=metadata, slot_mapping=batch.slot_mapping)
        skips = LayerView.empty()
        return [runs if path >> layer & 1 else skips for layer in range(batch.num_layers)]


@dataclass(frozen=True)
class _PassFunctions:
    """What a draft pass computes beside the model's layers, see RoutedStep.

    bypasses: one entry per layer; None: the model's own.
    """

    bypasses: Sequence[LayerFn | None] | None
    adapter: LayerFn | None

    @classmethod
    def of(cls, drafts: DraftPass, vllm_config: Any) -> "_PassFunctions":
        """drafts: its weights in the model's dtype, on its device."""
        adapter, bypass = drafts.adapter, drafts.bypass
        if adapter is None:
            return cls(None, None)
        weights = Bypass(adapter.down[None], adapter.up[None], adapter.eps)
        if bypass is None:
            return cls(None, *bypass_calls(weights, vllm_config))
        # An adapter has the form of a bypass and here its rank, so that all share one compiled function.
        together = Bypass(torch.cat([bypass.down, weights.down]), torch.cat([bypass.up, weights.up]), bypass.eps)
        *of_gaps, call = bypass_calls(together, vllm_config)
        bypasses: list[LayerFn | None] = [None] * drafts.path.bit_length()
        for layer, function in zip(bypass.layers or (), of_gaps, strict=True):
            bypasses[layer] = function
        return cls(bypasses, call)


def _refined(chain: Sequence[int], says: Sequence[int]) -> list[int]:
    """The drafts that a deeper pass agrees with, and the token that it puts after them.

    says: the deeper pass's tokens in place of each draft, and after the last.
    """
    agreed = 0
    while agreed < len(chain) and chain[agreed] == says[agreed]:
        agreed += 1
    return [*chain[:agreed], says[agreed]]


def _ngram_proposer(vllm_config: Any, shortest: int, longest: int) -> Any:
    """vLLM's own n-gram drafter; None if n-grams are off."""
    if longest == 0:
        return None
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    config = copy.copy(vllm_config)
    config.speculative_config = copy.copy(vllm_config.speculative_config)
    # vLLM sets both to 0 for method custom_class.
    config.speculative_config.prompt_lookup_min = shortest
    config.speculative_config.prompt_lookup_max = longest
    return NgramProposer(config)
