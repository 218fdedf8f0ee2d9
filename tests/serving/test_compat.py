"""What is taken from one version of vLLM: attention metadata that can be captured, or moved. No device."""

import inspect
from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import envs
from vllm.config.attention import AttentionConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata, FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadata

from vllm_buddy.serving.compat import (
    SUPPORTED_ATTENTION_BACKENDS,
    attention_problem,
    metadata_to_capture,
    moved_metadata,
)

NUM_ROWS = 4


def common() -> CommonAttentionMetadata:
    rows = torch.arange(NUM_ROWS + 1, dtype=torch.int32)
    return CommonAttentionMetadata(
        query_start_loc=rows,
        query_start_loc_cpu=rows,
        seq_lens=torch.ones(NUM_ROWS, dtype=torch.int32),
        num_reqs=NUM_ROWS,
        num_actual_tokens=NUM_ROWS,
        max_query_len=1,
        max_seq_len=512,
        block_table_tensor=torch.zeros(NUM_ROWS, 8, dtype=torch.int32),
        slot_mapping=torch.zeros(NUM_ROWS, dtype=torch.int64),
    )


class Builder:
    """FlashAttention's builder, as far as metadata_to_capture uses it. aot_schedule: True for version 3."""

    def __init__(self, aot_schedule: bool) -> None:
        self.aot_schedule = aot_schedule
        self.attention_config = AttentionConfig()
        self.asked: dict[str, Any] = {}

    def build(self, common_prefix_len: int, shared: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        assert common_prefix_len == 0
        assert fast_build, "the metadata would lie in the builder's own buffers"
        given = {
            "num_actual_tokens": shared.num_actual_tokens,
            "max_query_len": shared.max_query_len,
            "query_start_loc": shared.query_start_loc,
            "max_seq_len": shared.max_seq_len,
            "seq_lens": shared.seq_lens,
            "block_table": shared.block_table_tensor,
            "slot_mapping": shared.slot_mapping,
        }
        required = {f.name: None for f in fields(FlashAttentionMetadata) if f.default is MISSING}
        return FlashAttentionMetadata(**required | given)

    def _get_scheduler_metadata(self, **asked: Any) -> torch.Tensor:
        self.asked = asked
        return torch.zeros(17, dtype=torch.int32)


def test_version_3_gets_a_plan_and_a_bound_on_its_splits() -> None:
    """Fails if a captured graph keeps the number of splits that suited the lengths at its capture."""
    builder, shared = Builder(aot_schedule=True), common()
    metadata = metadata_to_capture(builder, shared)
    bound = AttentionConfig().flash_attn_max_num_splits_for_cuda_graph
    assert metadata.max_num_splits == builder.asked["max_num_splits"] == bound > 1
    assert len(metadata.scheduler_metadata) == 17
    assert builder.asked["seqlens"] is shared.seq_lens
    assert builder.asked["cu_query_lens"] is shared.query_start_loc
    assert metadata.seq_lens is shared.seq_lens
    assert metadata.block_table is shared.block_table_tensor


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_others_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch, batch_invariant: bool) -> None:
    """Fails if FlashAttention 2, Triton or batch-invariant attention is told of splits that it does not have."""
    if batch_invariant:
        # Not the environment, which vLLM reads once an engine has started and never again.
        monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)
    builder = Builder(aot_schedule=batch_invariant)
    metadata = metadata_to_capture(builder, common())
    assert metadata.max_num_splits == 0
    assert metadata.scheduler_metadata is None
    assert builder.asked == {}
    other = SimpleNamespace(build=lambda *args, **kwargs: "metadata")
    assert metadata_to_capture(other, common()) == "metadata"


def test_vllms_builder_is_as_we_use_it() -> None:
    """Fails if vLLM's side moves."""
    builder = Builder(aot_schedule=True)
    metadata_to_capture(builder, common())
    wanted = set(inspect.signature(FlashAttentionMetadataBuilder._get_scheduler_metadata).parameters) - {"self"}
    assert set(builder.asked) == wanted
    source = inspect.getsource(FlashAttentionMetadataBuilder.__init__)
    assert "self.aot_schedule =" in source
    assert "self.attention_config =" in source


BACKENDS = {
    "CPU_ATTN": CPUAttentionMetadata,
    "FLASH_ATTN": FlashAttentionMetadata,
    "TRITON_ATTN": TritonAttentionMetadata,
}


@pytest.mark.parametrize("name", SUPPORTED_ATTENTION_BACKENDS)
def test_moved_metadata_reads_other_blocks_and_nothing_else(name: str) -> None:
    """Fails if a backend keeps blocks or slots elsewhere, so that a layer reads the KV of another unit."""
    names = {field.name for field in fields(BACKENDS[name])}
    assert {"block_table", "slot_mapping"} <= names
    metadata = BACKENDS[name](**{field: SimpleNamespace(name=field) for field in names})
    before, table, slots = dict(vars(metadata)), torch.zeros(2, 3), torch.zeros(2)
    moved = moved_metadata(metadata, table, slots)
    assert vars(metadata) == before
    assert type(moved) is BACKENDS[name]
    assert vars(moved) == {**before, "block_table": table, "slot_mapping": slots}


def attention_group(backend: str, **attributes: Any) -> Any:
    """As vLLM's AttentionGroup."""
    return SimpleNamespace(backend=SimpleNamespace(get_name=lambda: backend), **attributes)


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ([[attention_group("CPU_ATTN")]], None),
        ([[attention_group("FLASH_ATTN", kernel_block_size=None)]], None),
        ([], "one attention backend for all layers"),
        ([[attention_group("CPU_ATTN"), attention_group("FLASH_ATTN")]], "one attention backend for all layers"),
        ([[attention_group("CPU_ATTN"), attention_group("CPU_ATTN")]], "--kv-cache-dtype-skip-layers"),
        ([[attention_group("FLASHINFER")]], "its wrappers hold one plan at a time"),
        ([[attention_group("FLEX_ATTENTION")]], "never tried with layers of different lengths"),
        ([[attention_group("FLASH_ATTN", kernel_block_size=64)]], "set --block-size to that"),
    ],
)
def test_attention_that_cannot_be_routed_is_told_with_the_way_out(groups: Any, told: str | None) -> None:
    """Fails if a server starts whose layers would share one piece of metadata, or its user is not told what to do."""
    problem = attention_problem(groups)
    assert problem is None if told is None else told in (problem or "")
