"""What a draft pass costs and when drafts pay (self-speculation; single-device form of DEX, arXiv 2606.29223).

A lossless request runs all layers; a short path of the same layers drafts its next tokens, and one step of all layers
checks them. Costs are shares of a step of the whole model on one row.
"""

from collections.abc import Sequence
from typing import Any


def pass_cost(config: Any, depth: int, ranks: int = 0, num_tokens: int | None = None) -> float:
    """The share of the model's weights that a pass of `depth` layers reads, with the head.

    ranks: the sum of the ranks of what it goes through beside its layers, see DraftExit.ranks. num_tokens: that the
    pass chooses among; None: all.

    A step of few rows takes the time of reading its weights. config: of a Hugging Face Llama or Qwen model.
    """
    hidden, num_layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads  # Q and O, K and V
    layer = hidden * (heads * head_dim + 3 * config.intermediate_size)
    head = hidden * config.vocab_size
    own_head = head if num_tokens is None else hidden * num_tokens
    return (depth * layer + 2 * hidden * ranks + own_head) / (num_layers * layer + head)


def batch_share(num_requests: int, row_cost: float) -> float:
    """What one of num_requests requests pays of a step. row_cost: of each row after the first."""
    return (1.0 + row_cost * (num_requests - 1)) / num_requests


def draft_gain(right: Sequence[float], cost: float, row: float) -> float:
    """Tokens per unit of cost, over those without drafts.

    right: [n], for each of n drafts the probability that it and all drafts before it are right. cost: of one draft
    pass. row: of checking one draft.
    """
    return (1.0 + sum(right)) / (1.0 + len(right) * (cost + row))


def chain_gains(right: float, rows: Sequence[float]) -> list[float]:
    """draft_gain of 1, 2, ... drafts that cost nothing to make.

    right: the probability that a draft is right if those before it are. rows: [n], of checking each of so many drafts.
    """
    gains, all_right, tokens = [], 1.0, 1.0
    for number, row in enumerate(rows, start=1):
        all_right *= right
        tokens += all_right
        gains.append(tokens / (1.0 + number * row))
    return gains
