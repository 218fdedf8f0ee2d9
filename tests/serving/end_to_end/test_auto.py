"""Budget "auto" in a real engine: what the response tells is what ran, also where load lowers a request."""

from dataclasses import replace
from typing import Any

import pytest

from tests.harness.auto_requests import LOAD_PRICE, PROMPTS, auto, chosen_depth
from tests.harness.engine import Ask, Engine
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS, PREDICTOR_PRICE
from vllm_buddy.method import budget_for_depth
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.serving.admission.chooser import BudgetChooser
from vllm_buddy.serving.admission.load import LoadPrice


def test_tokens_and_layers_of_auto_requests_are_those_of_the_budget_chosen(llama: Engine) -> None:
    """Fails if what the response tells is not what ran, or a request's own price or range is lost on the way."""
    llama.configure("masked", 4)
    tiny = llama.tiny
    asked: list[tuple[Ask, int, float | None]] = [
        (ask := auto(PROMPTS[0]), chosen_depth(tiny, ask), PREDICTOR_PRICE),
        (ask := auto(PROMPTS[1]), chosen_depth(tiny, ask), PREDICTOR_PRICE),
        (auto(PROMPTS[2], price=0), 8, 0.0),
        (auto(PROMPTS[3], price=1e6), 3, 1e6),
        (auto(PROMPTS[3], price=1e6, auto_min=0.5), 4, 1e6),
        (auto(PROMPTS[2], price=0, auto_max=0.8), 6, 0.0),
        (ask := auto(PROMPTS[4], price=20.0, auto_min=0.5, context=3), chosen_depth(tiny, ask, 20.0, (4, 6, 8)), 20.0),
        (Ask(PROMPTS[5], 0.625), 5, None),
        (Ask(PROMPTS[6], None), NUM_LAYERS, None),
    ]
    outputs = llama.run([ask for ask, _, _ in asked])
    llama.check([replace(ask, budget=depth / NUM_LAYERS, options={}) for ask, depth, _ in asked], outputs)
    for (_, depth, price), output in zip(asked, outputs, strict=True):
        told = output.kv_transfer_params["buddy"]
        assert (told["depth"], told["auto"], told["price"]) == (depth, price is not None, price)
        if price is not None:
            assert told["budget"] == budget_for_depth(depth, NUM_LAYERS)


@pytest.mark.parametrize("policy", ["masked", "kv_only", "zero"])
@pytest.mark.parametrize("preempted", [False, True])
def test_a_lowered_request_goes_on_as_the_reference_does(
    llama: Engine, monkeypatch: pytest.MonkeyPatch, policy: str, preempted: bool
) -> None:
    """Fails if the cache of a request is read wrongly after its depth changed, or is computed again on other paths."""
    llama.configure(policy, 0)
    tiny, scheduler = llama.tiny, llama.scheduler
    assert tiny.artifact.predictor is not None
    load = LoadPrice(LOAD_PRICE, waiting=(50, 60), running=(1, 3))
    limits = replace(scheduler._limits.auto, load_price=LOAD_PRICE)
    monkeypatch.setattr(scheduler._auto, "chooser", BudgetChooser(tiny.artifact.predictor, limits, load))
    monkeypatch.setattr(scheduler._auto, "lowers_running", True)
    asks = [auto(PROMPTS[0], 30, price=0), *(Ask(prompt, 1.0, 12) for prompt in PROMPTS[1:4])]
    routes: dict[str, Any] = {}

    def before_step(step: int) -> None:
        routes.update({req_id: routed.route for req_id, routed in scheduler._routed.items()})
        if preempted and step == 16:
            assert llama.preempt(0)

    lowered, *others = llama.run(asks, [0, 8, 8, 8], before_step)
    llama.check(asks[1:], others)
    told = lowered.kv_transfer_params["buddy"]
    assert (told["depth"], told["lowered_to"]) == (NUM_LAYERS, PREDICTOR_DEPTHS[0])
    assert (told["layers_executed_max"], told["layers_executed_min"]) == (NUM_LAYERS, PREDICTOR_DEPTHS[0])
    (route,) = (route for route in routes.values() if route.lowered)
    tokens = list(lowered.outputs[0].token_ids)
    inputs = [*asks[0].prompt, *tokens[:-1]]
    paths = [run.path for run in route.runs(0, len(inputs), inputs) for _ in range(run.num_tokens)]
    logits = routed_logits(tiny.model, inputs, paths, policy, tiny.artifact.bypass)
    assert logits[len(asks[0].prompt) - 1 :].argmax(dim=-1).tolist() == tokens
