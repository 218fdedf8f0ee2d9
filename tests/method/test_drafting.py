"""What drafts cost, and when they pay."""

from types import SimpleNamespace

import pytest

from vllm_buddy.method.drafting import batch_share, chain_gains, draft_gain, pass_cost

SMOLLM2 = SimpleNamespace(
    hidden_size=576,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
    vocab_size=49152,
)


def test_a_pass_costs_the_share_of_weights_that_it_reads() -> None:
    """Fails if the head, which no depth saves, or the bypass is forgotten."""
    assert pass_cost(SMOLLM2, 30) == 1.0
    head = 576 * 49152
    layer = 576 * (24 * 64 + 3 * 1536)
    assert pass_cost(SMOLLM2, 12) == pytest.approx((12 * layer + head) / (30 * layer + head))
    assert pass_cost(SMOLLM2, 12, 128) > pass_cost(SMOLLM2, 12)


def test_a_request_of_a_batch_pays_less_of_a_step_than_one_alone() -> None:
    """Fails if drafts, whose rows cost the same in every batch, would look as good in a large one."""
    assert batch_share(1, 0.02) == 1.0
    assert batch_share(8, 0.02) == pytest.approx(1.14 / 8)
    assert draft_gain([0.2], 0.0, 0.02 / batch_share(1, 0.02)) > 1.15
    assert draft_gain([0.2], 0.0, 0.02 / batch_share(16, 0.02)) < 1.0


def test_gain_counts_tokens_against_passes() -> None:
    """Fails if a certain draft of no cost does not double the speed, or a wrong one costs nothing."""
    assert draft_gain([], 0.5, 0.1) == 1.0
    assert draft_gain([1.0], 0.0, 0.0) == 2.0
    assert draft_gain([0.0, 0.0], 0.4, 0.1) == 0.5
    assert draft_gain([1.0], 0.25, 0.05) == pytest.approx(2.0 / 1.3)


def test_gains_of_chains_are_those_of_their_drafts() -> None:
    """Fails if the running sums of all lengths are not what each length gives alone."""
    rows = [0.3, 0.1, 0.08, 0.2]
    alone = [draft_gain([0.7**k for k in range(1, n + 1)], 0.0, rows[n - 1]) for n in range(1, 5)]
    assert chain_gains(0.7, rows) == pytest.approx(alone)
    assert chain_gains(0.7, []) == []
