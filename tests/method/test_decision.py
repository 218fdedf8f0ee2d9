"""Tests that the folded Decision Module equals the trained one on the Value states of a real forward pass."""

import numpy as np
import torch
from torch import nn

from tests.harness.tiny_models import VOCAB_SIZE, random_prompts
from tests.method.conftest import Tiny
from vllm_buddy.method import Context, DecisionModule, FoldedDecision
from vllm_buddy.method.byte_grid import byte_grid
from vllm_buddy.method.decision import value_table

# fp32 sums of value_dim = 64 products in another order, and scores of magnitude 1 to 10
SCORE_TOLERANCE = 1e-4
SILU_SLOPE = 1.1  # the largest slope of SiLU
# the same matrix product with another number of rows may sum in another order
VALUE_TOLERANCE = 1e-5


def _captured_values(model: nn.Module, token_ids: list[int]) -> torch.Tensor:
    """Return V of the first layer, [num_tokens, value_dim], from a hook in the model's own forward."""
    captured = []
    hook = model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *args: captured.append(args[-1]))
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    hook.remove()
    return captured[0][0]


def _module(value_dim: int, num_middle: int) -> DecisionModule:
    torch.manual_seed(0)
    module = DecisionModule(value_dim, num_middle)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return module


def test_folded_scores_equal_the_module_on_captured_values(tiny: Tiny) -> None:
    """Fails if folding omits the norm, a bias (Qwen2) or half of the first layer, so that serving uses other scores."""
    values = value_table(tiny.model)
    module = _module(values.shape[1], 6)
    folded = FoldedDecision.fold(module, values)
    for prompt in random_prompts(5, seed=3):
        captured = _captured_values(tiny.model, prompt)
        context = Context(folded.table_context)
        # Each table value is rounded by at most half a step of its grid.
        steps = byte_grid(folded.table_context)[1] + byte_grid(folded.table_newest)[1]
        tolerance = SCORE_TOLERANCE * 10 + SILU_SLOPE * np.abs(folded.w2) @ steps / 2
        for num_tokens in range(1, len(prompt) + 1):
            context.extend(prompt[num_tokens - 1 : num_tokens])
            with torch.no_grad():
                wanted = module(captured[:num_tokens].mean(dim=0), captured[num_tokens - 1]).numpy()
            assert (np.abs(folded.scores(context) - wanted) <= tolerance).all()


def test_a_grid_of_bytes_is_its_own_grid() -> None:
    """Fails if rounding a rounded table changes it: saving an artifact again would change its digest or its paths."""
    rng = np.random.default_rng(0)
    for magnitude in (1e-6, 1.0, 3e4):
        table = (magnitude * rng.standard_normal((500, 7))).astype(np.float32)
        table[:, 3] = 0.0
        codes, scale = byte_grid(table)
        again, scale_again = byte_grid(codes * scale)
        np.testing.assert_array_equal(again, codes)
        np.testing.assert_array_equal(scale_again[table.any(axis=0)], scale[table.any(axis=0)])
        # At most half a step, and a little more for the largest values if a scale was rounded down.
        assert (np.abs(codes * scale - table) <= 0.51 * scale).all()
        assert np.abs(codes).max() == 127


def test_value_of_a_token_depends_on_nothing_else(tiny: Tiny) -> None:
    """Fails if V of the first layer depends on position or on other tokens: a table of token ids is then wrong."""
    token, others = 7, random_prompts(1, seed=5, min_tokens=20, max_tokens=20)[0]
    table = value_table(tiny.model)
    for place in (0, 3, 19):
        captured = _captured_values(tiny.model, [*others[:place], token, *others[place + 1 :]])
        torch.testing.assert_close(captured[place], table[token], atol=VALUE_TOLERANCE, rtol=VALUE_TOLERANCE)


def test_table_has_a_row_for_every_token(tiny: Tiny) -> None:
    """Fails if the table is shorter than the padded embedding, from which the engine samples tokens."""
    assert value_table(tiny.model).shape[0] == VOCAB_SIZE


def test_folding_a_module_leaves_no_shared_memory(tiny: Tiny) -> None:
    """Fails if a folded array shares memory with the module, so that a training step after folding changes paths."""
    values = value_table(tiny.model)
    module = _module(values.shape[1], 6)
    folded = FoldedDecision.fold(module, values)
    before = folded.b1.copy(), folded.w2.copy(), folded.b2.copy()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    for array, old in zip((folded.b1, folded.w2, folded.b2), before):
        np.testing.assert_array_equal(array, old)


def test_large_hidden_states_do_not_overflow() -> None:
    """Fails if a very negative hidden state overflows exp(-x), which gives a warning in the log or a NaN score."""
    table = np.full((1, 2), -2000.0, dtype=np.float32)
    zeros = np.zeros_like(table)
    folded = FoldedDecision(table, zeros, zeros[0], np.ones((3, 2), np.float32), np.zeros(3, np.float32))
    context = Context(table)
    context.extend([0])
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(folded.scores(context), np.zeros(3))
