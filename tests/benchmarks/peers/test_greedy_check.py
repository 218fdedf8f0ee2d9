"""Tests the check of generated tokens: strict with wrong layers and wrong tokens, tolerant of rounding."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness.rounds import Refused
from benchmarks.peers.greedy_check import BFLOAT16_GAP, FLOAT32_GAP, GreedyCheck, LayersRun, num_agreed
from tests.harness.tiny_models import NUM_LAYERS, VOCAB_SIZE, save_tiny_model
from vllm_buddy.method import LayerPath
from vllm_buddy.method.kv_policy import MASKED
from vllm_buddy.method.reference import routed_logits

FULL = (1 << NUM_LAYERS) - 1
TOLERANCE = 1e-4  # float32, two orders of the same sums
PROMPT = torch.arange(7, 300, 23).tolist()
WHOLE = LayersRun()


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory) -> GreedyCheck:
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama")
    return GreedyCheck(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def greedy_answer(greedy: GreedyCheck, run: LayersRun = WHOLE, num_tokens: int = 8) -> list[int]:
    token_ids = list(PROMPT)
    for _ in range(num_tokens):
        logits = greedy.logits(token_ids, run, 0 if run.in_prompt else len(PROMPT))
        token_ids.append(int(logits[-1].argmax()))
    return token_ids[len(PROMPT) :]


@pytest.mark.parametrize("skipped", [(), (3,), (1, 2, 5)])
@pytest.mark.parametrize("in_prompt", [True, False])
def test_it_computes_what_the_methods_reference_computes(
    greedy: GreedyCheck, skipped: tuple[int, ...], in_prompt: bool
) -> None:
    """Fails if answers are judged by other layers than the loop names, or skipping begins at another token."""
    token_ids = [*PROMPT, *range(9)]
    first = 0 if in_prompt else len(PROMPT)
    without: LayerPath = FULL & ~sum(1 << layer for layer in skipped)
    paths = [FULL] * first + [without] * (len(token_ids) - first)
    expected = routed_logits(greedy._model, token_ids, paths, MASKED)
    found = greedy.logits(token_ids, LayersRun(frozenset(skipped), in_prompt), first)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_the_models_own_greedy_tokens_pass(greedy: GreedyCheck) -> None:
    """Fails if a correct loop is refused, whatever layers it runs."""
    for run in (LayersRun(), LayersRun(frozenset({2, 4})), LayersRun(frozenset({0, 1}), in_prompt=False)):
        answer = greedy_answer(greedy, run)
        assert not greedy.gaps(PROMPT, answer, run).any()
        greedy.check("right", [PROMPT], [answer], run, FLOAT32_GAP)


@pytest.mark.parametrize("at", [0, 3, 7])
def test_one_wrong_token_is_refused(greedy: GreedyCheck, at: int) -> None:
    """Fails if a kept draft that the model contradicts goes unseen: the first, one in between, the last."""
    answer = greedy_answer(greedy)
    answer[at] = (answer[at] + VOCAB_SIZE // 2) % VOCAB_SIZE
    with pytest.raises(Refused, match="'wrong' does not decode greedily"):
        greedy.check("wrong", [PROMPT] * 2, [greedy_answer(greedy), answer], LayersRun(), BFLOAT16_GAP)


def test_another_layer_than_said_is_refused(greedy: GreedyCheck) -> None:
    """Fails if a loop may say that it ran all layers and leave one out, or leave it out of the prompt as well."""
    answer = greedy_answer(greedy, LayersRun(frozenset({4})))
    for said in (LayersRun(), LayersRun(frozenset({3})), LayersRun(frozenset({4}), in_prompt=False)):
        with pytest.raises(Refused):
            greedy.check("other layers", [PROMPT], [answer], said, BFLOAT16_GAP)


def test_a_token_that_is_nearly_as_likely_passes_and_no_other(greedy: GreedyCheck) -> None:
    """Fails if rounding is taken for an error, or an error for rounding."""
    logits = greedy.logits(PROMPT, LayersRun(), 0)[-1]
    best, second = logits.topk(2)
    gap = float(best[0] - best[1])
    assert gap > 0.01
    greedy.check("rounded", [PROMPT], [[int(second[1])]], LayersRun(), gap * 1.001)
    with pytest.raises(Refused, match="nats behind"):
        greedy.check("wrong", [PROMPT], [[int(second[1])]], LayersRun(), gap * 0.999)


def test_numbers_that_are_none_are_refused(greedy: GreedyCheck, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a NaN passes because it is not greater than the tolerance."""
    monkeypatch.setattr(greedy, "gaps", lambda *_: torch.tensor([0.0, float("nan")]))
    with pytest.raises(Refused):
        greedy.check("nan", [PROMPT], [[1, 2]], LayersRun(), BFLOAT16_GAP)


def test_agreement_ends_at_the_first_difference() -> None:
    """Fails if tokens that happen to be equal after a difference count as agreed."""
    assert num_agreed([1, 2, 3, 4], [1, 2, 9, 4]) == 2
    assert num_agreed([1, 2], [1, 2]) == 2
    assert num_agreed([5, 2], [1, 2]) == 0


def test_loading_takes_the_values_that_loops_have(tmp_path: Path) -> None:
    """Fails if a float32 checkpoint is judged by weights that no bf16 loop has."""
    folder = save_tiny_model(tmp_path, "llama")
    weight = GreedyCheck.load(folder)._model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.bfloat16().float())
