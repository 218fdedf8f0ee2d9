"""Runs the real routing scheduler with a worker that only records which path wrote which token into which block.

The KV of a token depends on the tokens and the paths up to its position. Where a real worker stores K and V, this one
stores a hash of these, and it generates tokens from the hash. So a block that was made on another path, or from other
tokens, is detected at once. A step takes microseconds. Asynchronous scheduling works too, which vLLM does not offer on
CPU.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.harness.engine import BLOCK_SIZE, Ask, Tiny
from tests.harness.tiny_models import HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS, VOCAB_SIZE
from vllm_buddy.method import PathSchedule, RequestRoute, depth_for_budget, layers_of
from vllm_buddy.serving.schedule.plan import PLAN_ATTRIBUTE, LayerPlaces, RequestPlan

_START = 7
_NULL_BLOCK = 0
_CHECK_EVERY = 8  # steps; every entry of every layer is compared


@dataclass
class _Row:
    """What the worker knows about one request: its tokens and its blocks, by KV-cache group.

    entries: with KV units, what each layer stored, in order. places: where the layers lie.
    """

    tokens: list[int]
    tables: list[list[int]]
    entries: list[list[int]] = field(default_factory=list)
    places: LayerPlaces | None = None

    @property
    def blocks(self) -> list[int]:
        """Of the first group, in which the first layer lies, which all tokens run."""
        return self.tables[0]

    def slot(self, layer: int, index: int) -> int:
        """Where the layer stores its index-th entry."""
        assert self.places is not None
        block = self.places.first_block[layer] + index // BLOCK_SIZE
        number = self.tables[self.places.unit[layer]][block]
        assert number != _NULL_BLOCK, "writes to the block that vLLM gives to nobody"
        return number * BLOCK_SIZE + index % BLOCK_SIZE


def _next_hash(before: int, token: int, path: int) -> int:
    return hash((before, token, path))


def _sample(history: int) -> int:
    return history % VOCAB_SIZE


class PretendEngine:
    """The scheduler, the bookkeeping worker, and the queue of steps in flight between them."""

    def __init__(
        self,
        tiny: Tiny,
        schedule: PathSchedule,
        *,
        asynchronous: bool,
        num_blocks: int,
        chunk: int,
        buddy: Mapping[str, Any] | None = None,
    ) -> None:
        """Make scheduler and worker. buddy: further server settings."""
        from vllm import EngineArgs
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups, get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_buddy.serving.schedule.scheduler import make_scheduler

        config = EngineArgs(
            model=str(tiny.folder),
            model_impl="buddy",
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=512,
            block_size=BLOCK_SIZE,
            enforce_eager=True,
            max_num_seqs=16,
            # In a library of few paths, two requests often have the same path and meet in the cache.
            additional_config={
                "buddy": {
                    "artifact": str(tiny.artifact_folder),
                    "paths": "library",
                    "route_every": schedule.interval,
                    "decision_lag": schedule.lag,
                    **(buddy or {}),
                }
            },
        ).create_engine_config()
        config.scheduler_config.async_scheduling = asynchronous
        config.cache_config.num_gpu_blocks = num_blocks
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=NUM_KV_HEADS, head_size=HEAD_DIM, dtype=torch.float32
        )
        layers = {f"model.layers.{layer}.self_attn.attn": spec for layer in range(NUM_LAYERS)}
        self.config = config
        self.units = config.model_config.buddy_kv_units
        self.scheduler = make_scheduler(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(num_blocks, [], get_kv_cache_groups(config, layers)),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
            log_stats=True,
        )
        self.scheduler.max_num_scheduled_tokens = chunk
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._tiny = tiny
        self._schedule = PathSchedule(schedule.interval, max(schedule.lag, int(asynchronous)))
        self._queue_size = 2 if asynchronous else 1
        self._in_flight: deque[tuple[Any, Any]] = deque()
        self._rows: dict[str, _Row] = {}
        self._stored = [[0] * BLOCK_SIZE for _ in range(num_blocks)]
        self._stored_by_class: dict[tuple[int, int], int] = {}  # with KV units, by class and slot
        self._num_steps = self._num_requests = 0
        self._routes: dict[str, RequestRoute] = {}
        self.asks: dict[str, Ask] = {}
        self.generated: dict[str, list[int]] = {}
        self.told: dict[str, list[dict[str, Any]]] = {}  # what outputs say under kv_transfer_params["buddy"]
        self.stats: list[Any] = []  # vLLM's SchedulerStats of each step
        self.cache_hits = 0

    # --- requests ----------------------------------------------------------------------------------------------

    def add(self, ask: Ask, runs_as: Ask | None = None) -> str:
        """Send a request and return its id. runs_as: the request with a numeric budget that it must be equal to."""
        request = self.request(ask)
        self.scheduler.add_request(request)
        self.expect(request.request_id, runs_as or ask)
        self.generated[request.request_id] = []
        return request.request_id

    def request(self, ask: Ask) -> Any:
        """vLLM's Request for `ask`, which the scheduler does not know yet."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        params = SamplingParams(temperature=0.0, max_tokens=ask.max_tokens, ignore_eos=True, extra_args=ask.extra_args)
        self._num_requests += 1
        return Request(f"r{self._num_requests}", list(ask.prompt), params, None, block_hasher=self._hasher)

    def expect(self, request_id: str, ask: Ask) -> None:
        """Hold a request that was just sent to what `ask` gets."""
        self.asks[request_id] = ask
        self._routes[request_id] = self._route(ask)

    def expected(self, ask: Ask) -> list[int]:
        """Return what `ask` generates alone, without scheduler and cache."""
        route, tokens, history = self._route(ask), list(ask.prompt), _START
        done = 0
        while len(tokens) < len(ask.prompt) + ask.max_tokens:
            paths = _paths(route, done, len(tokens) - done, tokens)
            for token, path in zip(tokens[done:], paths, strict=True):
                history = _next_hash(history, token, path)
            done = len(tokens)
            tokens.append(_sample(history))
        return tokens[len(ask.prompt) :]

    def paths(self, ask: Ask, tokens: Sequence[int]) -> list[int]:
        """Return the path of every position of `ask`. tokens: its prompt and what it generated."""
        return _paths(self._route(ask), 0, len(tokens), tokens)

    def step(self) -> None:
        """Run one turn of the engine's loop: schedule and execute, then update if the queue of steps is full."""
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self._in_flight.append((output, self._execute(output)))
            if len(self._in_flight) < self._queue_size:
                return
        if self._in_flight:
            output, result = self._in_flight.popleft()
            for outputs in self.scheduler.update_from_output(output, result).values():
                if outputs.scheduler_stats is not None:
                    self.stats.append(outputs.scheduler_stats)
                for request_output in outputs.outputs:
                    self.generated[request_output.request_id].extend(request_output.new_token_ids)
                    if (params := request_output.kv_transfer_params) is not None:
                        self.told.setdefault(request_output.request_id, []).append(params["buddy"])

    def preempt(self, index: int, *, drop_stale_output: bool) -> None:
        """Preempt the running request at `index` (modulo their number) between two steps."""
        running = self.scheduler.running
        if running:
            request = running.pop(index % len(running))
            self.scheduler._preempt_request(request, time.monotonic(), drop_stale_output=drop_stale_output)
            # It may be scheduled again in the next step. vLLM does the same where it preempts between steps.
            self.scheduler.prev_step_scheduled_req_ids.discard(request.request_id)

    @property
    def idle(self) -> bool:
        return not self._in_flight and not self.scheduler.has_requests()

    # --- the worker --------------------------------------------------------------------------------------------

    def _execute(self, output: Any) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        plan = getattr(output, PLAN_ATTRIBUTE)
        for request_id in output.finished_req_ids:
            self._rows.pop(request_id, None)
        computed = self._take_in(output)
        sampled = {}
        self._num_steps += 1
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            row, start = self._rows[request_id], computed[request_id]
            self._lower(request_id, row.tokens)
            runs, cached_path = plan[request_id].runs, plan[request_id].cached_path
            paths = [run.path for run in runs for _ in range(run.num_tokens)]
            assert paths == _paths(self._routes[request_id], start, num_tokens, row.tokens), (
                "not the request's own path"
            )
            if cached_path is not None:
                self._check_cached(request_id, start, cached_path)
            history = self._load(row, start - 1)
            if self.units is not None:
                self._begin(row, plan[request_id], start)
            for position, path in enumerate(paths, start=start):
                history = _next_hash(history, row.tokens[position], path)
                self._stored[row.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE] = history
                if self.units is not None:
                    self._store(row, path, history)
            sampled[request_id] = [_sample(history)] if start + num_tokens == len(row.tokens) else []
            row.tokens += sampled[request_id]
        return ModelRunnerOutput(
            req_ids=list(sampled),
            req_id_to_index={request_id: index for index, request_id in enumerate(sampled)},
            sampled_token_ids=list(sampled.values()),
        )

    def _lower(self, request_id: str, tokens: Sequence[int]) -> None:
        """Lower our route as load lowered the scheduler's. Both have seen the same tokens."""
        theirs, ours = self.scheduler._routed[request_id].route, self._routes[request_id]
        for position, depth in theirs.lowered[len(ours.lowered) :]:
            assert ours.lower(depth, position, tokens)

    def _take_in(self, output: Any) -> dict[str, int]:
        """Update the rows as vLLM's runner does, and return the computed tokens of each scheduled request."""
        computed = {}
        for new in output.scheduled_new_reqs:
            self._rows[new.req_id] = _Row(list(new.prompt_token_ids), list(map(list, new.block_ids)))
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for request_id, blocks, num_computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens):
            computed[request_id] = num_computed
            if request_id in cached.resumed_req_ids:
                self._rows[request_id] = _Row(list(cached.all_token_ids[request_id]), list(map(list, blocks)))
            elif blocks is not None:
                for table, more in zip(self._rows[request_id].tables, blocks, strict=True):
                    table += more
        return computed

    def _check_cached(self, request_id: str, num_tokens: int, cached_path: int) -> None:
        row, history = self._rows[request_id], _START
        paths = _paths(self._routes[request_id], 0, num_tokens, row.tokens) if num_tokens else []
        for position, path in enumerate(paths):
            assert path == cached_path, "tokens found in the cache are said to have run another path"
            history = _next_hash(history, row.tokens[position], path)
            assert self._load(row, position) == history, "found a block that other tokens or another path made"
        self.cache_hits += num_tokens

    def _begin(self, row: _Row, plan: RequestPlan, start: int) -> None:
        """With KV units: take in where the layers lie, and check what they hold, at the start of a request always."""
        row.places = plan.places or row.places
        if plan.cached_path is not None:
            row.entries = [[] for _ in range(NUM_LAYERS)]
            history = _START
            for token in row.tokens[:start]:
                history = _next_hash(history, token, plan.cached_path)
                for layer in layers_of(plan.cached_path):
                    row.entries[layer].append(hash((history, layer)))
        if plan.cached_path is not None or self._num_steps % _CHECK_EVERY == 0:
            for layer, entries in enumerate(row.entries):
                found = [
                    self._stored_by_class[self.units.class_of[layer], row.slot(layer, i)] for i in range(len(entries))
                ]
                assert found == entries, "a layer does not hold what its tokens stored"

    def _store(self, row: _Row, path: int, history: int) -> None:
        for layer in layers_of(path):
            slot = row.slot(layer, len(row.entries[layer]))
            row.entries[layer].append(hash((history, layer)))
            self._stored_by_class[self.units.class_of[layer], slot] = row.entries[layer][-1]

    def _load(self, row: _Row, position: int) -> int:
        if position < 0:
            return _START
        return self._stored[row.blocks[position // BLOCK_SIZE]][position % BLOCK_SIZE]

    def _route(self, ask: Ask) -> RequestRoute:
        router = self._tiny.artifact.router(library=True)
        depth = depth_for_budget(ask.budget or 1.0, router.num_layers)
        return RequestRoute(router, self._schedule, depth, ask.prompt, ask.context)


def _paths(route: RequestRoute, start: int, num_tokens: int, token_ids: Sequence[int]) -> list[int]:
    return [run.path for run in route.runs(start, num_tokens, token_ids) for _ in range(run.num_tokens)]
