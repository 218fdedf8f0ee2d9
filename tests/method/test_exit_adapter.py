"""The adapter of an exit, as it is trained and as it is served."""

import torch

from vllm_buddy.method.exit_adapter import START_ALPHA, InducingAdapter

HIDDEN, RANK, EPS = 16, 4, 1e-5


def states() -> torch.Tensor:
    return 3 * torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))


def test_a_new_adapter_hardly_changes_a_state_and_all_of_it_learns() -> None:
    """Fails if training starts from a model that the adapter has broken, or a part of the adapter gets no gradient."""
    torch.manual_seed(0)
    adapter, hidden = InducingAdapter(HIDDEN, RANK, EPS, scale=3.0), states()
    adapted = adapter(hidden)
    assert 0 < float((adapted - hidden).detach().norm() / hidden.norm()) < 10 * START_ALPHA
    adapted.square().sum().backward()
    gradients = [parameter.grad for parameter in adapter.parameters()]
    assert len(gradients) == 3
    assert all(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_what_is_served_is_what_was_trained() -> None:
    """Fails if alpha or the scale is lost where W2 absorbs them, or the formula is another one."""
    torch.manual_seed(0)
    adapter, hidden = InducingAdapter(HIDDEN, RANK, EPS, scale=3.0), states()
    with torch.no_grad():
        adapter.alpha.fill_(0.5)
    normed = hidden / (hidden.square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    inner = normed @ adapter.w1.T
    expected = hidden + 0.5 * 3.0 * (inner * inner.sigmoid()) @ adapter.w2.T
    folded = adapter.folded()
    assert folded.rank == RANK
    torch.testing.assert_close(folded.apply(hidden), expected)
    torch.testing.assert_close(adapter(hidden), expected)


def test_rounding_changes_little_and_only_once() -> None:
    """Fails if an artifact stores other weights than those that were measured."""
    torch.manual_seed(0)
    rounded = InducingAdapter(HIDDEN, RANK, EPS).folded().rounded()
    again = rounded.rounded()
    assert torch.equal(rounded.down, again.down)
    assert torch.equal(rounded.up, again.up)
