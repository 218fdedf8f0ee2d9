"""Several samples of one prompt, and samples with a seed, as without routing."""

from tests.harness.engine import Ask, Engine
from tests.harness.tiny_models import VOCAB_SIZE, random_prompts

PROMPTS = [tuple(p) for p in random_prompts(4, seed=61, min_tokens=20, max_tokens=60)]


def test_parallel_samples_are_routed_each_by_its_own_tokens(llama: Engine) -> None:
    """Fails if n > 1 loses the budget, or samples of one prompt share more than the prompt."""
    llama.configure("masked", 1)
    sampling = {"n": 3, "temperature": 1.5, "seed": 7}
    ask = Ask(PROMPTS[0], 0.5, 40, sampling)
    first, second = (llama.run([ask])[0] for _ in range(2))
    texts = [tuple(sample.token_ids) for sample in first.outputs]
    assert len(set(texts)) == 3
    assert texts == [tuple(sample.token_ids) for sample in second.outputs]
    greedy = Ask(PROMPTS[0], 0.5, 12, {"n": 2, "temperature": 1.0, "top_k": 1})
    (output,) = llama.run([greedy])
    expected = llama.expected(Ask(PROMPTS[0], 0.5, 12)).token_ids
    assert [list(sample.token_ids) for sample in output.outputs] == [expected, expected]


def test_each_sample_tells_its_own_outcome(llama: Engine) -> None:
    """Fails if the response tells that of one sample, which vLLM does not name, or keeps those of another request."""
    llama.configure("masked", 1)
    sampling = {"n": 3, "temperature": 1.5, "seed": 7}
    (first,) = llama.run([Ask(PROMPTS[0], 0.5, 40, {**sampling, "stop_token_ids": list(range(0, VOCAB_SIZE, 16))})])
    told = first.kv_transfer_params["buddy"]
    assert len(told["samples"]) == 3
    for sample, outcome in zip(first.outputs, told["samples"]):
        assert outcome["decoded"]["tokens"] == len(sample.token_ids) - 1
        assert (outcome["budget"], outcome["layers_executed_min"], outcome["layers_executed_max"]) == (0.5, 4, 4)
    assert len({outcome["decoded"]["tokens"] for outcome in told["samples"]}) > 1
    assert {key: value for key, value in told.items() if key != "samples"} == told["samples"][0]
    (again,) = llama.run([Ask(PROMPTS[1], 0.75, 4, sampling)])
    assert [outcome["budget"] for outcome in again.kv_transfer_params["buddy"]["samples"]] == [0.75] * 3
    (single,) = llama.run([Ask(PROMPTS[1], 0.75, 4)])
    assert "samples" not in single.kv_transfer_params["buddy"]


def test_a_seeded_sample_does_not_depend_on_its_neighbours(llama: Engine) -> None:
    """Fails if routing changes the order in which random numbers are drawn."""
    llama.configure("masked", 4)
    ask = Ask(PROMPTS[1], 0.625, 40, {"temperature": 2.0, "top_p": 0.99, "seed": 3})
    (alone,) = llama.run([ask])
    beside = llama.run([Ask(PROMPTS[0], 0.5, 20), ask, Ask(PROMPTS[2], 1.0, 20, {"temperature": 1.0})])[1]
    assert alone.outputs[0].token_ids == beside.outputs[0].token_ids
