"""Inputs of decode attention in which what must not be read is NaN."""

from dataclasses import dataclass

import torch
from vllm_buddy_kernels.paged_attention import paged_attention, paged_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYER = 5

# Outputs are averages of values of size 1. float32: sums in another order, and a GPU's approximate exp2. 16 bits: the
# weights are rounded before they are multiplied by V, as in FlashAttention, and the output once more: 2 ** -8 each in
# bfloat16, 2 ** -11 in float16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

Tensor = torch.Tensor
Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, float]


@dataclass(frozen=True)
class Case:
    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    slot_paths: torch.Tensor
    layer: int = LAYER

    def kernel(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return paged_attention(*self.arguments(), out=out)

    def reference(self) -> torch.Tensor:
        return paged_attention_reference(*self.arguments())

    def arguments(self) -> Arguments:
        where = (self.block_table, self.seq_lens, self.slot_paths, self.layer)
        return (self.query, self.key_cache, self.value_cache, *where, self.query.shape[-1] ** -0.5)

    def check(self) -> None:
        """The kernel's output, in a poisoned buffer, against the reference's."""
        out = torch.full_like(self.query, float("nan"))
        assert self.kernel(out) is out
        tolerance = TOLERANCE[self.query.dtype]
        torch.testing.assert_close(out, self.reference(), rtol=tolerance, atol=tolerance)


def make_case(
    seq_lens: tuple[int, ...] = (1, 63, 257),
    kept: float = 0.5,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    layer: int = LAYER,
    unit: int = 1,
) -> Case:
    """vLLM's layout. Slots that must not be read hold NaN, and so does what lies before the cache.

    kept: share of units of consecutive slots that are valid.
    Entries of the block table behind a sequence point at a block of NaN whose slots claim to have run everything.
    """
    generator = torch.Generator().manual_seed(len(seq_lens) + head_size)
    num_heads, num_kv_heads = heads
    counts = [-(-length // block_size) for length in seq_lens]
    num_blocks = sum(counts) + 1
    order = torch.randperm(num_blocks, generator=generator, dtype=torch.int32)
    unused = order[-1]
    block_table = torch.full((len(seq_lens), max(counts, default=1) + 1), int(unused), dtype=torch.int32)
    draws = torch.rand(-(-num_blocks * block_size // unit), generator=generator) < kept
    valid = draws.repeat_interleave(unit)[: num_blocks * block_size].view(num_blocks, block_size)
    kv_cache = torch.full((num_blocks, num_kv_heads, block_size, 2 * head_size), float("nan"), dtype=dtype)
    used = torch.zeros(num_blocks, block_size, dtype=torch.bool)
    first = 0
    for row, (length, count) in enumerate(zip(seq_lens, counts)):
        blocks = order[first : first + count]
        first += count
        block_table[row, :count] = blocks
        used[blocks] = (torch.arange(count * block_size) < length).view(count, block_size)
    numbers = torch.randn(kv_cache.shape, generator=generator).to(dtype)
    kv_cache = torch.where((used & valid)[:, None, :, None], numbers, kv_cache)
    other_layers = torch.randint(0, 2**62, (num_blocks, block_size), generator=generator) & ~(1 << layer)
    slot_paths = other_layers | (valid | ~used).long() << layer
    query = torch.randn(len(seq_lens), num_heads, head_size, generator=generator).to(dtype)
    kv_cache = torch.cat((torch.full_like(kv_cache[:1], float("nan")), kv_cache)).to(DEVICE)[1:]
    key_cache, value_cache = kv_cache.transpose(1, 2).split(head_size, -1)
    lengths = torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)
    on_device = (block_table.to(DEVICE), lengths, slot_paths.flatten().to(DEVICE), layer)
    return Case(query.to(DEVICE), key_cache, value_cache, *on_device)
