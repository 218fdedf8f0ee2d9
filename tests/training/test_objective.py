"""The training losses against plain PyTorch, the initial regression, and the search for paths."""

import numpy as np
import torch

from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE, load_model, save_tiny_model
from vllm_buddy.training.objective import distillation_loss, divergence, next_token_loss, top_log_probs
from vllm_buddy.training.path_search import removal_order
from vllm_buddy.training.regression import LayerMoments, fit_bypass

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
ROWS, SIZE, VOCAB, TOP = 5, 16, 40, 8


def sample(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (student hidden [2, ROWS, SIZE], teacher hidden, head)."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, ROWS, SIZE, generator=generator)
    return student, teacher, torch.randn(VOCAB, SIZE, generator=generator)


def test_distillation_is_the_divergence_over_top_tokens_and_the_rest() -> None:
    """Fails if the loss or its hand-written gradient differs from autograd's."""
    student, teacher, head = sample()
    student.requires_grad_()
    ids, log_p = top_log_probs(teacher, head, TOP)
    loss = distillation_loss(student, head, ids, log_p)
    log_q = (student @ head.T).log_softmax(-1)
    p, q = log_p.exp(), log_q.gather(-1, ids).exp()
    p_rest, q_rest = 1 - p.sum(-1), 1 - q.sum(-1)
    expected = ((p * (log_p - log_q.gather(-1, ids))).sum(-1) + p_rest * (p_rest / q_rest).log()).mean()
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    (found,) = torch.autograd.grad(3 * loss, student)
    (wanted,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    torch.testing.assert_close(divergence(student, head, ids, log_p).mean(), expected, **TOLERANCE)


def test_distillation_with_all_tokens_is_the_whole_divergence() -> None:
    """Fails if the loss is infinite or incomplete when the top tokens are the whole vocabulary."""
    student, teacher, head = sample()
    ids, log_p = top_log_probs(teacher, head, VOCAB)
    p, q = (teacher @ head.T).log_softmax(-1), (student @ head.T).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(distillation_loss(student, head, ids, log_p), expected, rtol=1e-3, atol=1e-4)


def test_next_token_loss_is_cross_entropy() -> None:
    """Fails if the loss or its hand-written gradient differs from PyTorch's cross-entropy."""
    student, _, head = sample()
    student.requires_grad_()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(VOCAB, size=(2, ROWS)))
    loss = next_token_loss(student, head, tokens)
    expected = torch.nn.functional.cross_entropy((student @ head.T)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (loss, expected)), **TOLERANCE)


def test_regression_finds_a_low_rank_layer() -> None:
    """Fails if the regression does not find a layer that has exactly its form."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(4000, SIZE, generator=generator)
    normed = torch.nn.functional.rms_norm(before, (SIZE,), eps=1e-6)
    a, b = torch.randn(3, SIZE, generator=generator), torch.randn(SIZE, 3, generator=generator)
    moments = LayerMoments(SIZE, torch.device("cpu"))
    moments.add(before, before + normed @ a.T @ b.T, torch.randn(4000, SIZE, generator=generator), eps=1e-6)
    down, up = moments.low_rank(3)
    added = normed @ a.T @ b.T
    error = (normed @ down.T @ up.T - added).norm() / added.norm()
    assert error < 0.01  # the ridge term causes an error of a thousandth


def test_regression_repairs_a_model_without_training(tmp_path) -> None:
    """Fails if pairs of units, numbers of layers or the norm are wrong, which training would hide for a while."""
    model = load_model(save_tiny_model(tmp_path, "llama")).requires_grad_(False)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(VOCAB_SIZE, size=(24, 64)))
    from vllm_buddy.training.path_search import single_divergences

    bare = single_divergences(model, tokens[:4], None)
    repaired = single_divergences(model, tokens[:4], fit_bypass(model, tokens, rank=128))
    assert (repaired < bare).all()


def test_search_leaves_out_a_layer_that_does_nothing_first(tmp_path) -> None:
    """Fails if the search does not remove a layer without effect first."""
    model = load_model(save_tiny_model(tmp_path, "llama"))
    with torch.no_grad():
        model.model.layers[3].self_attn.o_proj.weight.zero_()
        model.model.layers[3].mlp.down_proj.weight.zero_()
    tokens = torch.from_numpy(np.random.default_rng(0).integers(VOCAB_SIZE, size=(2, 16)))
    order = removal_order(model, tokens, None, 4)
    assert order[0] == 3
    assert sorted(order) == list(range(1, NUM_LAYERS - 1))
