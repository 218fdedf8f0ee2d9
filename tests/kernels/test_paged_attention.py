"""Decode attention with validity bits: the kernel against its reference, and the reference against PyTorch's own."""

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm_buddy_kernels.paged_attention import split_count, tile_tokens
from vllm_buddy_kernels.triton_import import KernelError

from tests.kernels.attention_case import DEVICE, LAYER, TOLERANCE, make_case

pytest.importorskip("triton")
SAME = TOLERANCE[torch.float32]
MODULE = importlib.import_module("vllm_buddy_kernels.paged_attention")


@pytest.mark.parametrize("unit", [1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_validity(dtype: torch.dtype, unit: int) -> None:
    """Fails if an invalid token is attended to or read (0 * NaN is NaN), scattered or a whole block of them."""
    make_case(dtype=dtype, unit=unit).check()


@pytest.mark.parametrize("valid", [(0, 4), (300, 304), (0, 304)])
def test_tiles_without_a_valid_token(valid: tuple[int, int]) -> None:
    """Fails if such a tile, at the start, the end or in between, changes the sums or is read."""
    case = make_case((400,), kept=1.0)
    tile = tile_tokens(32, 4)
    slots = (case.block_table[0, :25, None] * 16 + torch.arange(16, device=DEVICE)).flatten().long()
    invalid = torch.ones(400, dtype=torch.bool, device=DEVICE)
    invalid[list(valid)] = False
    assert invalid[tile : 2 * tile].all()
    slots = slots[invalid]
    case.slot_paths[slots] &= ~(1 << LAYER)
    for cache in (case.key_cache, case.value_cache):
        cache[slots // 16, slots % 16] = float("nan")
    case.check()


@pytest.mark.parametrize(
    ("heads", "head_size"), [((2, 2), 64), ((9, 3), 64), ((8, 2), 80), ((8, 1), 128), ((4, 4), 96)]
)
def test_shapes_of_models(heads: tuple[int, int], head_size: int) -> None:
    """Fails if a query head meets another KV head, or padding of the group or of the head gets into a sum."""
    make_case((1, 63), heads=heads, head_size=head_size).check()


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_none_and_all_valid(kept: float) -> None:
    """Fails if a sequence without a valid token gives NaN, or a valid token is left out."""
    case = make_case(kept=kept)
    case.check()
    if kept == 0.0:
        assert case.kernel().eq(0).all()


def test_empty_batch_and_empty_sequence() -> None:
    """Fails if nothing to do is an error, or a padded row of a captured graph (length 0) is read or left as it was."""
    case = make_case((5,))
    nothing = replace(case, query=case.query[:0], block_table=case.block_table[:0], seq_lens=case.seq_lens[:0])
    assert nothing.kernel().shape == (0, 4, 32)
    out = torch.full_like(case.query, float("nan"))
    assert replace(case, seq_lens=torch.zeros_like(case.seq_lens)).kernel(out).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_valid_is_plain_attention(dtype: torch.dtype) -> None:
    """Fails if kernel and reference share a mistake: PyTorch's attention over the same tokens knows neither."""
    length = 37
    case = make_case((length,), kept=1.0, heads=(6, 2), dtype=dtype)
    keys, values = (
        cache[case.block_table[0, :3].long()].flatten(0, 1)[:length].transpose(0, 1)
        for cache in (case.key_cache, case.value_cache)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.query[0][:, None], keys.repeat_interleave(3, 0), values.repeat_interleave(3, 0)
    )[:, 0]
    for output in (case.kernel()[0], case.reference()[0]):
        torch.testing.assert_close(output, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_invalid_tokens_are_as_if_absent() -> None:
    """Fails if kernel and reference agree on a wrong reading of validity: packing changes nothing."""
    case = make_case((63,))
    slots = (case.block_table[0, :4, None] * 16 + torch.arange(16, device=DEVICE)).flatten()[:63].long()
    valid = slots[(case.slot_paths[slots] >> LAYER & 1).bool()]
    assert 0 < len(valid) < 63
    keys, values = (cache[valid // 16, valid % 16].transpose(0, 1) for cache in (case.key_cache, case.value_cache))
    expected = torch.nn.functional.scaled_dot_product_attention(
        case.query[0][:, None], keys.repeat_interleave(2, 0), values.repeat_interleave(2, 0)
    )[:, 0]
    torch.testing.assert_close(case.kernel()[0], expected, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("splits", [2, 16])
def test_splits_change_nothing(monkeypatch: pytest.MonkeyPatch, splits: int) -> None:
    """Fails if splits overlap, leave tokens out, weigh each other wrongly, or one without a valid token gives NaN."""
    for kept, unit in ((0.3, 64), (1.0, 1), (0.0, 1)):
        case = make_case((0, 1, 257), kept=kept, unit=unit)
        monkeypatch.setattr(MODULE, "split_count", lambda *_: 1)
        whole = case.kernel()
        monkeypatch.setattr(MODULE, "split_count", lambda *_: splits)
        case.check()
        torch.testing.assert_close(case.kernel(), whole, rtol=SAME, atol=SAME)


@pytest.mark.parametrize("layer", [0, 1, 62])
def test_bits_of_other_layers_do_not_matter(layer: int) -> None:
    """Fails if a neighbouring bit is read, or the sign bit spreads into bit 62."""
    case = make_case((63,), layer=layer)
    case.check()
    alone = case.slot_paths & (1 << layer)
    full = case.slot_paths | ~torch.tensor(1 << layer, device=DEVICE)
    for slot_paths in (alone, full):
        assert torch.equal(replace(case, slot_paths=slot_paths).kernel(), case.kernel())


@pytest.mark.parametrize("block_size", [32, 128])
def test_block_sizes(block_size: int) -> None:
    """Fails if a tile that spans several blocks, or lies within one, finds wrong slots."""
    make_case((1, 63, 257), block_size=block_size).check()


def test_views_are_read_and_written_in_place() -> None:
    """Fails if strides of query, block table or output are ignored, or anything beside the output is written."""
    case = make_case((63, 20))
    wide = torch.full((2, 4, 64), float("nan"), device=DEVICE)
    wide[..., :32] = case.query
    table = torch.full((2, 9), -1, dtype=torch.int32, device=DEVICE)
    table[:, : case.block_table.shape[1]] = case.block_table
    out = torch.full((2, 8, 32), float("nan"), device=DEVICE)
    view = replace(case, query=wide[..., :32], block_table=table[:, : case.block_table.shape[1]])
    view.kernel(out[:, 2:6])
    torch.testing.assert_close(out[:, 2:6], case.reference(), rtol=SAME, atol=SAME)
    assert out[:, :2].isnan().all()
    assert out[:, 6:].isnan().all()


def test_a_wrong_answer_is_noticed() -> None:
    """Fails if the comparison passes whatever the kernel computes."""
    case = make_case((63,))
    wrong = replace(case, slot_paths=case.slot_paths.roll(1))
    assert not torch.allclose(wrong.reference(), case.reference(), rtol=2e-2, atol=2e-2, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer": 63}, "layer is 63; .* layers 0 to 62"),
        ({"layer": -1}, "layer is -1"),
        ({"query": torch.zeros(1, 3, 32)}, "3 query heads cannot share 2 KV heads"),
        ({"query": torch.zeros(1, 4, 32, dtype=torch.float64)}, "query is torch.float64 .* one of torch.float32"),
        ({"key_cache": torch.zeros(2, 24, 2, 32), "value_cache": torch.zeros(2, 24, 2, 32)}, "block_size is 24"),
        ({"key_cache": torch.zeros(2, 8, 2, 32), "value_cache": torch.zeros(2, 8, 2, 32)}, "at least 16"),
        ({"value_cache": torch.zeros(2, 16, 2, 48)}, r"value_cache is \[2, 16, 2, 48\]"),
        ({"key_cache": torch.zeros(2, 16, 2, 32, dtype=torch.float16)}, "key_cache is torch.float16"),
        ({"block_table": torch.zeros(1, 2, dtype=torch.int64)}, "block_table is torch.int64"),
        ({"seq_lens": torch.zeros(2, dtype=torch.int32)}, r"seq_lens is torch.int32 \[2\]"),
        ({"slot_paths": torch.zeros(31, dtype=torch.int64)}, r"slot_paths is torch.int64 \[31\].*\[32\]"),
        ({"query": torch.zeros(1, 4, 32, device="meta")}, "out is on meta|on query's device, meta"),
    ],
)
def test_what_the_kernel_would_misread_is_refused(changes: dict[str, Any], message: str) -> None:
    """Fails if a caller's mistake ends in wrong attention, or in an error that does not say what is allowed."""
    moved: dict[str, Any] = {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value
        for name, value in changes.items()
    }
    with pytest.raises(KernelError, match=message):
        replace(make_case((9,)), **moved).kernel()


def test_an_output_of_another_form_is_refused() -> None:
    """Fails if the output of another batch is written past its end."""
    case = make_case((9,))
    with pytest.raises(KernelError, match=r"out is \[2, 4, 32\]; it must be \[1, 4, 32\]"):
        case.kernel(torch.zeros(2, 4, 32, device=DEVICE))


def test_the_op_is_described_truly() -> None:
    """Fails if torch.compile or a fake tensor is told of other outputs or mutations than happen."""
    case = make_case((9,))
    arguments = (*case.arguments(), torch.empty_like(case.query))
    torch.library.opcheck(MODULE._paged_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_launch_table_depends_on_sizes_alone() -> None:
    """Fails if a graph captured for a batch would be launched with more splits than it has room for, or with none."""
    assert [split_count(n, 8, 8192) for n in (1, 8, 32, 256)] == [32, 16, 4, 1]
    assert split_count(1, 1, 1 << 20) == 64
    assert split_count(1, 8, 16) == split_count(0, 8, 4096 * 16) // 64 == 1
    assert [tile_tokens(h, 2) for h in (16, 64, 128, 256)] == [128, 128, 64, 32]
    assert tile_tokens(256, 4) == 16


@pytest.mark.skipif(DEVICE == "cpu", reason="real sizes need a CUDA device")
@pytest.mark.parametrize(("heads", "head_size"), [((32, 8), 128), ((28, 4), 128), ((9, 3), 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_sizes(heads: tuple[int, int], head_size: int, dtype: torch.dtype) -> None:
    """Fails if what holds for a few tokens does not for thousands, or in a captured graph once lengths changed."""
    case = make_case((1, 1000, 4096, 257), kept=0.6, heads=heads, head_size=head_size, dtype=dtype)
    case.check()
    out = torch.full_like(case.query, float("nan"))
    lengths = case.seq_lens.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.kernel(out)
    for shorter in (1, 2):
        case.seq_lens.copy_((lengths // shorter).clamp(min=1))
        graph.replay()
        torch.testing.assert_close(out, case.reference(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
