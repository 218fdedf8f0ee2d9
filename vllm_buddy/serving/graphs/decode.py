"""Decode steps as CUDA graphs, although the layers that run change from step to step.

vLLM's own graphs replay a fixed list of layers. Here each layer has a graph for each batch size, attention included, so
that a step with any paths is a list of replays. Paths that recur get one graph for the whole step. All graphs read what
differs between steps from persistent buffers, which one copy from the host and one kernel fill.

Decoding is bound by reading weights. So rows that skip a layer are not gathered away where other rows run it: they go
through it, write to no slot (-1) and attend to one token, and their bypass replaces the output.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.forward_context import create_forward_context, override_forward_context
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_buddy.errors import SettingsError
from vllm_buddy.serving.compat import metadata_to_capture
from vllm_buddy.serving.forward.layer import FusedBypass, after_norm, passed_by
from vllm_buddy.serving.forward.pipeline import is_here
from vllm_buddy.serving.graphs.buffers import FIRST_BLOCK, FIRST_POSITION, ONE_TOKEN, SOURCE, DecodeBuffers
from vllm_buddy.serving.graphs.cache import GraphCache
from vllm_buddy.serving.graphs.capture import Capture, OutOfGraphMemory, Replay
from vllm_buddy.serving.kv import KVPolicy
from vllm_buddy.serving.worker.batch import RunPlaces, StepBatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm_buddy_kernels import Kernels

    from vllm_buddy.serving.forward.models import RoutedBackbone

logger = init_logger(f"vllm.{__name__}")

# vLLM's all-reduce keeps a record of each all-reduce ever captured, also of graphs that were dropped: 65,536, beyond
# which the engine ends. Each rank captures the same.
_MOST_ALL_REDUCES, _MOST_PATHS_OF_RANKS = 60_000, 400
_CAPTURE_AFTER = 3  # steps with the same paths and size, at first; a capture takes as long as about ten steps


class Use(Enum):
    """Which rows of a step run a layer."""

    ALL = "all"
    SOME = "some"
    NONE = "none"


Uses = tuple[Use, ...]
Groups = tuple[int, ...]


@dataclass
class GraphedStep:
    """A decode step whose buffers are filled, ready to be replayed.

    uses: of each layer. groups: of each layer; those of one group hold equally many tokens of every row.
    mask: [num_layers, num_rows], bool: which rows run the layer.
    """

    graphs: "DecodeGraphs"
    size: int
    uses: Uses
    groups: Groups
    mask: np.ndarray
    executed: np.ndarray

    def forward(
        self,
        _backbone: "RoutedBackbone",
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        _inputs_embeds: torch.Tensor | None,
        _intermediate_tensors: Any = None,
    ) -> torch.Tensor:
        """Hidden states [num_rows, hidden_size] after the last norm; see Step."""
        assert input_ids is not None  # neither prompt embeddings nor pipeline stages have graphs
        return self.graphs.run(self, input_ids, positions)

    def counts(self) -> np.ndarray:
        """[num_rows], layers executed per row."""
        return self.executed


def paths_of_ranks(num_layers: int, num_sizes: int) -> int:
    """How many paths tensor-parallel ranks may capture, beside the graphs of each layer for num_sizes sizes.

    num_layers: of the model, each with two all-reduces, beside that of the embedding.

    Raises:
        SettingsError: not even the graphs of each layer can be captured.
    """
    of_each_layer = num_sizes * (4 * (num_layers - 2) + 5)  # the first and the last layer have one graph, others two
    if of_each_layer > _MOST_ALL_REDUCES:
        raise SettingsError(
            f"CUDA graphs of {num_layers} layers for {num_sizes} sizes capture {of_each_layer} all-reduces, of which "
            f"vLLM can record {_MOST_ALL_REDUCES}; give fewer graphs.sizes"
        )
    return min(_MOST_PATHS_OF_RANKS, (_MOST_ALL_REDUCES - of_each_layer) // (2 * num_layers + 1))


class DecodeGraphs:
    """Graphs of the decode steps of one model.

    backbone: the routed model, its layers loaded, their KV caches bound. bypasses: of each layer, or None.
    policy: one that works in graphs. builder: of attention metadata. block_size: of the KV cache, in tokens.
    sizes: numbers of rows that are captured, ascending; a step is padded to the next one.
    memory_limit: of the captured graphs, in bytes.
    """

    def __init__(
        self,
        backbone: "RoutedBackbone",
        bypasses: Sequence[FusedBypass | None] | None,
        policy: KVPolicy,
        *,
        kernels: "Kernels",
        builder: Any,
        block_size: int,
        vllm_config: "VllmConfig",
        sizes: Sequence[int],
        memory_limit: int,
        capture: Capture,
    ) -> None:
        self._backbone, self._bypasses, self._policy = backbone, bypasses, policy
        self._kernels, self._builder = kernels, builder
        self._layers = list(backbone.layers)
        self._block_size = block_size
        self._vllm_config = vllm_config
        self._max_model_len = vllm_config.model_config.max_model_len
        self.sizes = list(sizes)
        self._capture = capture
        num_blocks, most_rows = -(-self._max_model_len // block_size), self.sizes[-1]
        table_bytes = 4 * len(self._layers) * most_rows * num_blocks
        moves_first_blocks = policy.moves_first_blocks and table_bytes <= memory_limit // 2
        num_units = 1 if policy.units is None else policy.units.num_units
        if policy.units is not None and not moves_first_blocks:
            raise SettingsError(
                f'kv_layout "units" with CUDA graphs takes {table_bytes >> 20} MiB for block tables of each layer, '
                f"more than half of graphs.memory_mib {memory_limit >> 20}; raise it, or lower --max-model-len or "
                "graphs.sizes"
            )
        if moves_first_blocks != policy.moves_first_blocks:
            logger.warning(
                "vllm_buddy: block tables of each layer would take %d MiB, more than half of graphs.memory_mib, so "
                "steps of requests that left their first path run without graphs; lower --max-model-len or "
                "graphs.sizes",
                table_bytes >> 20,
            )
        self._buffers = DecodeBuffers(backbone, most_rows, num_blocks, moves_first_blocks, num_units)
        self._pieces: dict[tuple[int, Any], Replay] = {}  # by size and piece
        self.paths = GraphCache(memory_limit, _CAPTURE_AFTER)
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            self.paths.captures_left = paths_of_ranks(len(self._layers), len(self.sizes))

    def step(self, batch: StepBatch, places: RunPlaces) -> GraphedStep | None:
        """Fill the buffers for a decode step. None if it is no decode step, or too large, or its layers need their own
        block tables and there is no room for these."""
        num_rows, buffers, shifted = batch.num_tokens, self._buffers, places.first_block is not None
        if num_rows != len(batch.plans) or num_rows > self.sizes[-1] or (shifted and buffers.tables is None):
            return None
        size = next(size for size in self.sizes if size >= num_rows)
        mask = batch.run_mask.T
        on_device = buffers.plan(size)
        plan = np.full(on_device.shape, -1, dtype=np.int32)
        plan[FIRST_POSITION, :, :num_rows] = places.first_position
        plan[SOURCE, :, :num_rows] = np.where(mask, np.arange(num_rows), -1)
        if buffers.tables is not None:
            plan[FIRST_BLOCK] = 0
            if places.first_block is not None:
                plan[FIRST_BLOCK, :, :num_rows] = buffers.entries(places.first_block, batch.table_width)
        async_tensor_h2d(plan, out=on_device)
        num_blocks = -(-(int(batch.num_computed_tokens.max()) + 1) // self._block_size)
        first_block = on_device[FIRST_BLOCK, :, :num_rows] if shifted else None
        if first_block is not None and batch.units is not None:
            buffers.fill_unit_tables(batch.block_table, first_block, num_blocks)
        else:
            buffers.fill_tables(batch.block_table, first_block, num_blocks)
        running = mask.sum(axis=1).tolist()
        uses = tuple(Use.ALL if n == num_rows else Use.SOME if n else Use.NONE for n in running)
        seen: dict[bytes, int] = {}
        keys = plan[FIRST_POSITION]
        if shifted:
            keys = np.concatenate([keys, plan[FIRST_BLOCK] * (keys >= 0)], axis=1)
        groups = tuple(seen.setdefault(key.tobytes(), len(seen)) for key in keys)
        return GraphedStep(self, size, uses, groups, mask, np.zeros(num_rows, dtype=np.int32))

    def run(self, step: GraphedStep, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Replay a step whose buffers `step` has just filled."""
        num_rows, size, buffers = len(step.executed), step.size, self._buffers
        buffers.input_ids[:num_rows].copy_(input_ids[:num_rows])
        buffers.positions[:num_rows].copy_(positions[:num_rows])
        replay = self._replay_of_path((size, step.uses, step.groups))
        pieces = self._pieces_of(step.uses)
        if replay is not None:
            replay()
        else:
            for piece in ("start", *pieces, "end"):
                self._pieces[size, piece]()
        ran = [layer for layer, use in pieces if use is not Use.NONE]
        step.executed += step.mask[ran].sum(axis=0, dtype=np.int32)
        return buffers.output[:num_rows]

    def _replay_of_path(self, key: tuple[int, Uses, Groups]) -> Replay | None:
        """The graph of a whole step, captured if the step recurs and there is room for it."""
        if (replay := self.paths.get(key)) is not None or not self.paths.recurs(key):
            return replay
        try:
            (replay,), num_bytes = self._capture([partial(self._path, *key)])
        except OutOfGraphMemory as error:
            logger.warning("vllm_buddy: no memory to capture a path, its layers are replayed one by one: %s", error)
            self.paths.refuse(key)
            return None
        self.paths.put(key, replay, num_bytes)
        return self.paths.get(key)

    def capture_pieces(self) -> int:
        """Capture the graphs of all layers for every size; returns the memory that they and the layers' block tables
        take, in bytes. It is taken off the memory for graphs of whole paths.

        To be called at start, when the buffers are empty: each piece is run once before it is captured.
        """
        num_bytes = 0 if self._buffers.tables is None else self._buffers.tables.nbytes
        for size in reversed(self.sizes):  # the largest first: the others fit into the memory that it took
            bodies = {piece: partial(self._piece, size, piece) for piece in self._all_pieces()}
            replays, taken = self._capture(list(bodies.values()), warm_up=True)
            self._pieces |= {(size, piece): replay for piece, replay in zip(bodies, replays, strict=True)}
            num_bytes += taken
        self.paths.limit = max(0, self.paths.limit - num_bytes)
        return num_bytes

    def _all_pieces(self) -> list[Any]:
        last = len(self._layers) - 1
        pieces: list[Any] = ["start", "end", (0, Use.ALL), (last, Use.ALL)]
        for layer in range(1, last):
            uses = Use if is_here(self._layers[layer]) else [Use.NONE]
            pieces += [(layer, use) for use in uses if use is not Use.NONE or self._leaves_something]
        return pieces

    @property
    def _leaves_something(self) -> bool:
        """Whether a layer that no row runs has an effect all the same."""
        return self._bypasses is not None or self._policy.writes_skipped

    def _pieces_of(self, uses: Uses) -> list[tuple[int, Use]]:
        return [(layer, use) for layer, use in enumerate(uses) if use is not Use.NONE or self._leaves_something]

    def _path(self, size: int, uses: Uses, groups: Groups) -> None:
        """A whole step."""
        hidden, residual, normed = self._start(size), None, None
        with self._forward_context(size, dict(enumerate(groups))):
            pieces = self._pieces_of(uses)
            for (layer, use), following in zip(pieces, [*pieces[1:], None]):
                norm_of = None if following is None or following[1] is Use.NONE else following[0]
                hidden, residual, normed = self._layer(size, layer, use, hidden, residual, normed, norm_of)
            self._end(size, hidden, residual)

    def _piece(self, size: int, piece: Any) -> None:
        """One layer, or what comes before or after all layers; it reads and writes the buffers."""
        hidden, residual = self._buffers.hidden[:size], self._buffers.residual[:size]
        if piece == "start":
            hidden.copy_(self._start(size))
            return
        if piece == "end":
            self._end(size, hidden, residual)
            return
        layer, use = piece
        with self._forward_context(size, {layer: 0}):
            new_hidden, new_residual, _ = self._layer(
                size, layer, use, hidden, None if layer == 0 else residual, None, None
            )
        # vLLM's norms work in place: the new residual may lie in either buffer, so it goes first.
        if new_residual is None:
            residual.zero_()
        elif new_residual.data_ptr() != residual.data_ptr():
            residual.copy_(new_residual)
        hidden.copy_(new_hidden)

    def _start(self, size: int) -> torch.Tensor:
        """Slots and lengths of all layers, and the embedding."""
        buffers = self._buffers
        rows, plan = buffers.rows[:size], buffers.plan(size)
        first_block = None if buffers.tables is None else plan[FIRST_BLOCK]
        self._kernels.layer_slots(
            buffers.block_table, rows, rows, buffers.rows[: size + 1], plan[FIRST_POSITION], first_block,
            self._block_size, ONE_TOKEN, buffers.slots(size), buffers.lengths(size),
        )  # fmt: skip
        return self._backbone.embed_input_ids(buffers.input_ids[:size])

    def _end(self, size: int, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """The last norm. The last layer runs for everyone, so there is a residual."""
        normed, _ = self._backbone.norm(hidden, residual)
        self._buffers.output[:size].copy_(normed)

    def _layer(
        self,
        size: int,
        index: int,
        use: Use,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        normed: torch.Tensor | None,
        norm_of: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Run one layer; returns hidden, residual, and their sum normalised for layer `norm_of` where it was fused.

        normed: the normalised input of this layer, where the layer before returned it; hidden is then the whole state.
        """
        layer, bypass, buffers = self._layers[index], self._bypasses and self._bypasses[index], self._buffers
        positions = buffers.positions[:size]
        if use is Use.NONE:
            if self._policy.writes_skipped and is_here(layer):
                self._policy.write_skipped(layer, positions, hidden, residual, buffers.slots(size)[index])
            return *passed_by([bypass] if bypass else None, hidden, residual, buffers.everyone[:size]), None
        source = buffers.plan(size)[SOURCE, index]
        if use is Use.SOME:
            # Computed first, because the layer overwrites its input.
            passed, rest = passed_by([bypass] if bypass else None, hidden, residual, source < 0)
            if not bypass:
                passed = hidden.clone() if rest is None else hidden + rest
        if normed is None:
            hidden, residual = layer(positions, hidden, residual)
        else:
            hidden, residual = after_norm(layer, positions, normed, hidden)
        if use is Use.ALL:
            return hidden, residual, None
        norm = None if norm_of is None else self._layers[norm_of].input_layernorm
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
        next_normed, state = self._kernels.scatter_rows(hidden, residual, source, passed, None, weight, eps)
        return state, None, next_normed

    def _forward_context(self, size: int, groups: Mapping[int, int]) -> Any:
        """vLLM's forward context for some layers. groups: of each of them."""
        attn_metadata, slot_mapping, of_group = {}, {}, {}
        for index, group in groups.items():
            if not is_here(self._layers[index]):
                continue
            if group not in of_group:
                of_group[group] = self._metadata(size, index)
            name = self._layers[index].self_attn.attn.layer_name
            slot_mapping[name] = self._buffers.slots(size)[index]
            attn_metadata[name] = of_group[group]
        return override_forward_context(
            create_forward_context(attn_metadata, self._vllm_config, slot_mapping=slot_mapping)
        )

    def _metadata(self, size: int, index: int) -> Any:
        """On persistent buffers, for lengths up to what the model allows."""
        buffers = self._buffers
        common = CommonAttentionMetadata(
            query_start_loc=buffers.rows[: size + 1],
            query_start_loc_cpu=torch.arange(size + 1, dtype=torch.int32),
            seq_lens=buffers.lengths(size)[index],
            num_reqs=size,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=self._max_model_len,
            block_table_tensor=buffers.table(size, index),
            slot_mapping=buffers.slots(size)[index],
            causal=True,
        )
        return metadata_to_capture(self._builder, common)
