"""What requests may ask for, and what becomes of those that ask for something else."""

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from vllm.exceptions import VLLMValidationError

from tests.harness.engine import Ask, Engine
from tests.harness.tiny_models import VOCAB_SIZE, random_prompts
from vllm_buddy.method import smallest_budget
from vllm_buddy.serving.admission.options import OptionError

PROMPTS = [tuple(p) for p in random_prompts(4, seed=61, min_tokens=20, max_tokens=60)]
SMALLEST = "0.375"  # three of eight layers

OUT_OF_RANGE = (0, 0.0, -0.5, -1, 1.0001, 2, 2**40, math.nan, math.inf, -math.inf)
WRONG_TYPE = ([0.5], [], (0.5,), {"b": 0.5}, "half", "", "0.5", "NaN", True, False, b"0.5", np.array([0.5, 0.5]))
TOO_LOW = (0.374, 0.25, 0.1, 1e-9, 5e-324)


def refused(engine: Engine, extra_args: dict[str, Any]) -> Any:
    """Send a request that must be refused beside one that must not notice; returns vLLM's error."""
    good = Ask(PROMPTS[0], 0.5, 6)
    engine.add(good, "good")
    engine.step()
    with pytest.raises(VLLMValidationError) as caught:
        engine.add(Ask(PROMPTS[1], None, 6, {"extra_args": extra_args}), "bad")
    outputs = engine.finish()
    assert list(outputs) == ["good"]
    engine.check([good], [outputs["good"]])
    return caught.value


@pytest.mark.parametrize("value", [*OUT_OF_RANGE, *WRONG_TYPE], ids=lambda v: repr(v)[:20])
def test_a_budget_that_is_no_number_in_range_is_refused(llama: Engine, value: Any) -> None:
    """Fails if a bad budget is served as something else, kills the engine, or is refused without saying why."""
    error = refused(llama, {"buddy_budget": value})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert "buddy_budget" in str(error)
    assert "(0, 1]" in str(error)


@pytest.mark.parametrize("value", ["yes", 2, [1]])
def test_paths_are_asked_for_with_true_or_false(llama: Engine, value: Any) -> None:
    """Fails if a request that asks for its paths in another way gets none and is not told why."""
    error = refused(llama, {"buddy_paths": value})
    assert error.parameter == "vllm_xargs.buddy_paths"
    assert "true or false" in str(error)


@pytest.mark.parametrize("value", TOO_LOW)
def test_a_budget_below_three_layers_is_refused_with_the_smallest_allowed(llama: Engine, value: float) -> None:
    """Fails if a path would lack a middle layer, or the user is not told what the least is."""
    error = refused(llama, {"buddy_budget": value})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert SMALLEST in str(error)


def test_the_smallest_budget_need_not_be_rounded(llama: Engine) -> None:
    """Fails if 3 / L is refused where it has more decimals than the smallest budget that messages name."""
    limits = llama.llm.llm_engine.model_config.buddy_limits
    limits = replace(limits, num_layers=32, min_budget=smallest_budget(32), depths=None)
    assert limits.resolve({"buddy_budget": 3 / 32}).depth == 3
    with pytest.raises(OptionError, match=r"below the smallest allowed budget 0\.094"):
        limits.resolve({"buddy_budget": 0.0937})


def test_a_budget_below_the_servers_floor_is_refused_with_the_floor(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if `min_budget` of the server is not enforced."""
    model_config = llama.llm.llm_engine.model_config
    monkeypatch.setattr(model_config, "buddy_limits", replace(model_config.buddy_limits, min_budget=0.6))
    assert "0.6" in str(refused_only(llama, 0.59))
    llama.run([Ask(PROMPTS[1], 0.6, 2)])


def test_a_budget_above_the_servers_ceiling_is_refused_with_the_ceiling(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a client can make the server spend more than `max_budget`, by whichever option."""
    model_config = llama.llm.llm_engine.model_config
    limits = replace(model_config.buddy_limits, max_budget=0.75, default_budget=0.75)
    monkeypatch.setattr(model_config, "buddy_limits", limits)
    assert "above the largest allowed budget 0.75" in str(refused_only(llama, 0.76))
    assert "largest allowed budget" in str(refused_only(llama, 1.0))
    error = refused(llama, {"buddy_budget": 0.5, "buddy_prompt": "full"})
    assert error.parameter == "vllm_xargs.buddy_prompt"
    assert "largest budget that a request may ask for is 0.75" in str(error)
    with pytest.raises(VLLMValidationError, match=r"session runs at full depth, .* is 0\.75"):
        session_request(llama, None)
    llama.run([Ask(PROMPTS[1], 0.75, 2)])


def refused_only(engine: Engine, budget: float) -> Any:
    with pytest.raises(VLLMValidationError) as caught:
        engine.add(Ask(PROMPTS[1], budget, 2))
    return caught.value


def test_a_depth_that_the_library_lacks_is_refused_with_those_it_has(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if `paths: library` meets a depth without paths in the scheduler, where it would end the engine."""
    model_config = llama.llm.llm_engine.model_config
    monkeypatch.setattr(model_config, "buddy_limits", replace(model_config.buddy_limits, depths=(4, 6)))
    message = str(refused_only(llama, 0.625))
    assert "5 of 8" in message
    assert "4, 6, 8" in message
    llama.run([Ask(PROMPTS[1], budget, 2) for budget in (0.5, 0.75, 1.0)])


def limit(engine: Engine, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change what the server allows requests with budget "auto"."""
    model_config = engine.llm.llm_engine.model_config
    limits = model_config.buddy_limits
    monkeypatch.setattr(model_config, "buddy_limits", replace(limits, auto=replace(limits.auto, **changes)))


def test_auto_is_refused_without_a_budget_predictor(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if "auto" is taken for a number, or its refusal does not say why and what else can be sent."""
    model_config = llama.llm.llm_engine.model_config
    monkeypatch.setattr(model_config, "buddy_limits", replace(model_config.buddy_limits, auto=None))
    error = refused(llama, {"buddy_budget": "auto"})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert all(told in str(error) for told in ("no Budget Predictor", "(0, 1]", "train-budget"))
    assert "auto" not in str(refused(llama, {"buddy_budget": "half"}))


@pytest.mark.parametrize("value", ["Auto", "auto ", "AUTO", ["auto"]], ids=repr)
def test_what_only_looks_like_auto_is_refused(llama: Engine, value: Any) -> None:
    """Fails if a misspelt "auto" is served, or the user is not told how it is spelt."""
    error = refused(llama, {"buddy_budget": value})
    assert error.parameter == "vllm_xargs.buddy_budget"
    assert '(0, 1] or "auto"' in str(error)


@pytest.mark.parametrize("value", [-0.1, -1, math.nan, math.inf, -math.inf, True, "1", "", [1.0], {}], ids=repr)
def test_a_price_that_is_no_finite_number_from_0_up_is_refused(llama: Engine, value: Any) -> None:
    """Fails if a bad price ends the engine, or turns the choice around."""
    error = refused(llama, {"buddy_budget": "auto", "buddy_price": value})
    assert error.parameter == "vllm_xargs.buddy_price"
    assert "buddy_price" in str(error)
    assert "from 0 up" in str(error)


@pytest.mark.parametrize("key", ["buddy_auto_min", "buddy_auto_max"])
@pytest.mark.parametrize("value", [0, 1.5, math.nan, "0.5", "auto", True, [0.5]], ids=repr)
def test_an_end_of_the_range_that_is_no_budget_is_refused(llama: Engine, key: str, value: Any) -> None:
    """Fails if the range of "auto" is not checked as budgets are."""
    error = refused(llama, {"buddy_budget": "auto", key: value})
    assert error.parameter == f"vllm_xargs.{key}"
    assert "(0, 1]" in str(error)


@pytest.mark.parametrize("key", ["buddy_auto_min", "buddy_auto_max"])
@pytest.mark.parametrize("value", [0.4, 0.9])
def test_a_range_beyond_the_servers_is_refused_with_the_servers(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, key: str, value: float
) -> None:
    """Fails if a request makes the server spend, or save, more than its operator lets "auto"."""
    limit(llama, monkeypatch, smallest=0.5, largest=0.8)
    error = refused(llama, {"buddy_budget": "auto", key: value})
    assert error.parameter == f"vllm_xargs.{key}"
    assert "0.5 to 0.8" in str(error)


@pytest.mark.parametrize(("low", "high"), [(0.625, 0.7), (0.8, 0.5), (0.9, None)])
def test_a_range_without_a_budget_of_the_grid_is_refused_with_the_grid(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, low: float, high: float | None
) -> None:
    """Fails if an empty choice ends the engine. Of the grid of 3, 4, 6 and 8 layers the server allows 4 and 6."""
    limit(llama, monkeypatch, smallest=0.5, largest=0.95)
    error = refused(llama, {"buddy_budget": "auto", "buddy_auto_min": low, "buddy_auto_max": high})
    assert error.parameter == "vllm_xargs.buddy_auto_min"
    assert "among 0.5, 0.8 (" in str(error)


@pytest.mark.parametrize("budget", [0.5, None])
@pytest.mark.parametrize("key", ["buddy_price", "buddy_auto_min", "buddy_auto_max"])
def test_an_option_of_auto_beside_another_budget_is_refused(llama: Engine, key: str, budget: float | None) -> None:
    """Fails if a price that changes nothing is accepted in silence."""
    error = refused(llama, {"buddy_budget": budget, key: 0.5})
    assert error.parameter == f"vllm_xargs.{key}"
    assert f'budget "auto", but the budget is {budget or 1:g}' in str(error)


def test_options_of_auto_need_no_budget_where_auto_is_the_default(
    llama: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the server's default does not count as the request's budget when its options are checked."""
    for config in (llama.llm.llm_engine.model_config, llama.scheduler.vllm_config.model_config):
        monkeypatch.setattr(config, "buddy_limits", replace(config.buddy_limits, default_budget="auto"))
    monkeypatch.setattr(llama.scheduler, "_limits", replace(llama.scheduler._limits, default_budget="auto"))
    asks = [Ask(PROMPTS[0], None, 2, options={"buddy_price": price}) for price in (0, 1e6)]
    told = [output.kv_transfer_params["buddy"] for output in llama.run(asks)]
    assert [(outcome["depth"], outcome["price"]) for outcome in told] == [(8, 0.0), (3, 1e6)]
    error = refused(llama, {"buddy_budget": 0.5, "buddy_price": 1.0})
    assert error.parameter == "vllm_xargs.buddy_price"


def test_what_the_server_allows_travels_to_other_processes(llama: Engine) -> None:
    """Fails if the limits cannot be pickled, or the tables of the predictor go with them to every process."""
    limits = llama.llm.llm_engine.model_config.buddy_limits
    text = pickle.dumps(limits)
    assert pickle.loads(text) == limits
    assert limits.auto is not None
    assert len(text) < 1000


@pytest.mark.parametrize("value", [0, -1, len(PROMPTS[1]) + 1, 2**40, 3.0, "3", True, [3], math.nan], ids=repr)
def test_a_context_that_is_not_within_the_prompt_is_refused(llama: Engine, value: Any) -> None:
    """Fails if the context is cut to the prompt in silence, or ends the engine where the prompt is routed."""
    error = refused(llama, {"buddy_budget": 0.5, "buddy_context_tokens": value})
    assert error.parameter == "vllm_xargs.buddy_context_tokens"
    assert f"from 1 to {len(PROMPTS[1])}" in str(error)


def test_a_context_of_one_token_and_of_the_whole_prompt_are_served(llama: Engine) -> None:
    """Fails if the smallest or the largest allowed context is refused."""
    llama.configure("masked", 4)
    asks = [Ask(PROMPTS[1], 0.5, 4, context=context) for context in (1, len(PROMPTS[1]))]
    llama.check(asks, llama.run(asks))


def test_an_option_that_does_not_exist_is_refused_by_name(llama: Engine) -> None:
    """Fails if a misspelt option is passed over: the request would run at another budget than it asked for."""
    error = refused(llama, {"buddy_bugdet": 0.5})
    assert error.parameter == "vllm_xargs.buddy_bugdet"
    names = ("buddy_budget", "buddy_prompt", "buddy_mode", "buddy_context_tokens", "buddy_paths", "buddy_price")
    assert ", ".join(names) in str(error)


MISSPELT = {
    "buddy_buget": "buddy_budget",
    "Buddy-Budget": "buddy_budget",
    "budy_budget": "buddy_budget",
    "buddybudget": "buddy_budget",
    "buddy_min": "buddy_auto_min",
    "buddy_context_token": "buddy_context_tokens",
}


@pytest.mark.parametrize("key", MISSPELT)
def test_a_misspelt_option_is_refused_with_the_right_name(llama: Engine, key: str) -> None:
    """Fails if a slip of the pen is served at the default budget, or the refusal does not tell the right name."""
    error = refused(llama, {key: 0.5})
    assert error.parameter == f"vllm_xargs.{key}"
    assert f"did you mean '{MISSPELT[key]}'?" in str(error)


def test_what_a_refusal_shows_of_a_huge_option_is_short(llama: Engine) -> None:
    """Fails if a request's megabytes come back in the response and in the log."""
    nested: list[Any] = [["x" * 50] * 50] * 50
    huge = "9" * 10**6
    for options in ({"buddy_budget": huge}, {"buddy_mode": nested}, {"buddy_prompt": [huge]}, {f"buddy_{huge}": 1}):
        error = refused(llama, options)
        assert len(str(error)) < 600
        assert len(str(error.value)) <= 80
        assert "\n" not in str(error)


def test_a_price_of_minus_zero_is_zero(llama: Engine) -> None:
    """Fails if the response tells a price that nobody writes."""
    limits = llama.llm.llm_engine.model_config.buddy_limits
    assert str(limits.resolve({"buddy_budget": "auto", "buddy_price": -0.0}).price) == "0.0"


@pytest.mark.parametrize("token_id", [VOCAB_SIZE, VOCAB_SIZE + 63, 2**31, -1])
def test_a_token_id_that_the_model_lacks_is_refused(llama: Engine, token_id: int) -> None:
    """Fails if it reaches the router's tables, where it would end the engine and all requests with it.

    vLLM checks ids against its tokenizer, of which the engine here has none, and lets ids pass that only it has.
    """
    good = Ask(PROMPTS[0], 0.5, 6)
    llama.add(good, "good")
    for budget in (0.5, 1.0, None):
        with pytest.raises(VLLMValidationError, match=f"token id {token_id} .* 0 to {VOCAB_SIZE - 1}"):
            llama.add(Ask((1, token_id, 2), budget, 2))
    outputs = llama.finish()
    llama.check([good], [outputs["good"]])
    llama.run([Ask((0, VOCAB_SIZE - 1), 0.5, 2)])


def test_options_of_others_are_left_alone(llama: Engine) -> None:
    """Fails if extra arguments that are not ours are refused."""
    others = {"other": [1, "x"], "budget": 2, "session_id": "a", "mode": "fast", "": 0, "buddy_budget": None}
    llama.run([Ask(PROMPTS[0], None, 2, {"extra_args": others})])


@pytest.mark.parametrize("budget", [1, 1.0, 0.375, np.float64(0.5)])
def test_budgets_at_the_edge_are_served(llama: Engine, budget: float) -> None:
    """Fails if the smallest or the largest allowed budget is refused."""
    llama.configure("masked", 4)
    ask = Ask(PROMPTS[2], budget, 4)
    llama.check([ask], llama.run([ask]))


def test_the_same_id_again_right_after_an_abort(llama: Engine) -> None:
    """Fails if a request inherits path, lengths or count of an aborted one with its id."""
    llama.configure("masked", 1)
    first, second = Ask(PROMPTS[0], 0.5, 30), Ask(PROMPTS[1], 0.75, 12)
    for _ in range(3):
        llama.add(first, "again")
        for _ in range(4):
            llama.step()
        llama.abort("again")
        llama.add(second, "again")
        outputs = llama.finish()
        llama.check([second], [outputs["again"]])
        assert outputs["again"].kv_transfer_params["buddy"]["tokens"] <= len(second.prompt) + second.max_tokens - 1


def test_the_engines_own_id_may_come_again(llama: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if scheduler or worker keep state under the id of a finished request: vLLM can be told to keep ids."""
    monkeypatch.setattr("vllm.v1.engine.input_processor.random_uuid", lambda: "same")
    llama.configure("masked", 1)
    first, second = Ask(PROMPTS[0], 0.5, 30), Ask(PROMPTS[1], 0.75, 12)
    llama.add(first, "id")
    for _ in range(4):
        llama.step()
    llama.abort("id")
    llama.add(second, "id")
    llama.check([second], [llama.finish()["id"]])


def test_an_abort_leaves_nothing_behind_and_disturbs_nobody(llama: Engine) -> None:
    """Fails if an aborted request keeps its route, its outcome or its slot in the KV policy."""
    llama.configure("masked", 1, chunk=33)
    for when in (0, 1, 2, 5):
        good = [Ask(PROMPTS[0], 0.5, 10), Ask(PROMPTS[2], 0.75, 10)]
        ids = [llama.add(ask) for ask in good]
        victim = llama.add(Ask(PROMPTS[1], 0.5, 50))
        for _ in range(when):
            llama.step()
        llama.abort(victim)
        outputs = llama.finish()
        llama.check(good, [outputs[i] for i in ids])
    llama.abort_all()
    assert not llama.scheduler._routed
    assert not llama.runner.buddy_state.policy._slot


SESSION_OPTIONS = ({"buddy_budget": 0.5}, {"buddy_budget": 1.0}, {"buddy_context_tokens": 1}, {"buddy_price": 0.1})


@pytest.mark.parametrize("extra_args", SESSION_OPTIONS, ids=str)
def test_a_streaming_input_session_that_asks_for_a_budget_is_refused(llama: Engine, extra_args: dict[str, Any]) -> None:
    """Fails if a session, which has no prompt to route by, runs at full depth although it asked for something else."""
    (key,) = extra_args
    if key == "buddy_price":
        extra_args = {**extra_args, "buddy_budget": "auto"}
    with pytest.raises(VLLMValidationError, match="streaming-input session runs at full depth") as caught:
        session_request(llama, extra_args)
    assert caught.value.parameter.startswith("vllm_xargs.buddy_")


def test_a_streaming_input_session_without_options_passes(llama: Engine) -> None:
    """Fails if sessions are refused that ask for nothing, or a session is not told from an ordinary request."""
    assert session_request(llama, None).resumable
    assert session_request(llama, {"other": 1}).resumable


def session_request(engine: Engine, extra_args: dict[str, Any] | None) -> Any:
    """What vLLM makes of one chunk of a streaming-input session."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=2, extra_args=extra_args)
    prompt = {"prompt_token_ids": list(PROMPTS[0])}
    processor = engine.llm.llm_engine.input_processor
    return processor.process_inputs("session", prompt, params, ("generate",), resumable=True)


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


@pytest.mark.parametrize("value", ["lossles", "", 1, True, ["lossless"]])
def test_a_mode_that_is_unknown_is_refused_with_those_that_are_known(llama: Engine, value: Any) -> None:
    """Fails if a misspelt mode is served as another one."""
    error = refused(llama, {"buddy_mode": value})
    assert error.parameter == "vllm_xargs.buddy_mode"
    assert '"budget" and "lossless"' in str(error)


def test_lossless_mode_needs_a_server_that_drafts(llama: Engine) -> None:
    """Fails if a request that asks to be sped up losslessly runs plainly without being told."""
    assert "--lossless-drafts" in str(refused(llama, {"buddy_mode": "lossless"}))


def test_lossless_mode_beside_a_budget_below_one_is_refused(llama: Engine) -> None:
    """Fails if one of two options that contradict each other wins silently."""
    limits = replace(llama.llm.llm_engine.model_config.buddy_limits, lossless=True)
    whole = limits.resolve({"buddy_mode": "lossless"})
    assert whole == limits.resolve({"buddy_mode": "lossless", "buddy_budget": 1.0})
    assert (whole.budget, whole.depth, whole.lossless) == (1.0, 8, True)
    for value in (True, "1", [1], np.array([1.0, 1.0])):
        with pytest.raises(OptionError, match=r"\(0, 1\]"):
            limits.resolve({"buddy_mode": "lossless", "buddy_budget": value})
    for key, value in (("buddy_budget", 0.5), ("buddy_budget", "auto"), ("buddy_price", 1.0)):
        with pytest.raises(OptionError, match='"lossless" runs all layers') as caught:
            limits.resolve({"buddy_mode": "lossless", key: value})
        assert caught.value.key == key
