"""Budget "auto" in scheduler and engine: what was chosen is what runs, load lowers it, and nobody else notices."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.harness.engine import Ask, Engine, Tiny
from tests.harness.pretend_worker import PretendEngine
from tests.harness.shown_metrics import ShownMetrics
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS, PREDICTOR_PRICE, random_prompts
from vllm_buddy.method import PathSchedule, budget_for_depth
from vllm_buddy.method.reference import routed_logits
from vllm_buddy.serving.admission.chooser import BudgetChooser
from vllm_buddy.serving.admission.latency import Latencies, LatencyMeter
from vllm_buddy.serving.admission.load import LoadPrice

PROMPTS = [tuple(p) for p in random_prompts(12, seed=81, min_tokens=3, max_tokens=90)]
LOAD_PRICE = 40.0
NUM_BLOCKS = 400
FEW_BLOCKS = 24


def auto(prompt: tuple[int, ...], max_tokens: int = 8, *, context: int | None = None, **options: Any) -> Ask:
    """A request with budget "auto". options: without the prefix of their names."""
    own = {"buddy_budget": "auto", **{f"buddy_{key}": value for key, value in options.items()}}
    return Ask(prompt, None, max_tokens, context=context, options=own)


def fixed(ask: Ask, depth: int) -> Ask:
    """The request that says as a number what was to be chosen for `ask`."""
    return replace(ask, budget=budget_for_depth(depth, NUM_LAYERS), options={})


def chosen_depth(
    tiny: Tiny, ask: Ask, price: float = PREDICTOR_PRICE, allowed: Sequence[int] = PREDICTOR_DEPTHS
) -> int:
    """What the predictor says, asked alone."""
    predictor = tiny.artifact.predictor
    assert predictor is not None
    return predictor.depth(predictor.excess(ask.prompt[: ask.context]), price, allowed)


# --- the scheduler, with a worker that only keeps books ----------------------------------------------------------


def pretend(
    tiny: Callable[[str], Tiny], *, asynchronous: bool, num_blocks: int = NUM_BLOCKS, chunk: int = 33, **buddy: Any
) -> PretendEngine:
    return PretendEngine(
        tiny("llama"),
        PathSchedule(4, 1),
        asynchronous=asynchronous,
        num_blocks=num_blocks,
        chunk=chunk,
        # Most tests are about arriving requests.
        buddy={**buddy, "load": {"lowers_running": False, **buddy["load"]}} if "load" in buddy else buddy,
    )


def outcome(engine: PretendEngine, request_id: str) -> tuple[int, float | None]:
    """Depth and price of an unfinished request."""
    found = engine.scheduler._routed[request_id].outcome
    return found.depth, found.price


def step_until(engine: PretendEngine, done: Callable[[], bool]) -> None:
    """Step until `done`, at most some thousand times."""
    for _ in range(3000):
        if done():
            return
        engine.step()
    raise AssertionError("it does not happen")


def finish(engine: PretendEngine) -> None:
    """Serve what there is; every request must get what it gets alone, at the budget it is said to run at."""
    while not engine.idle:
        engine.step()
    for request_id, ask in engine.asks.items():
        assert engine.generated[request_id] == engine.expected(ask)


both = pytest.mark.parametrize("asynchronous", [False, True], ids=("sync", "async"))
layouts = pytest.mark.parametrize("layout", ["dense", "units"])


@both
@pytest.mark.parametrize("default", [False, True], ids=("asked", "default"))
def test_auto_is_the_explicit_budget_that_the_predictor_names(
    tiny: Callable[[str], Tiny], asynchronous: bool, default: bool
) -> None:
    """Fails if another depth runs than the predictor says, or "auto" runs other paths than the number it stands for.

    Half of the requests say a number, and share blocks of the prefix cache with the others.
    """
    made = pretend(tiny, asynchronous=asynchronous, default_budget="auto" if default else 1.0)
    depths = []
    for number, prompt in enumerate(PROMPTS * 2):
        ask = auto(prompt, 20, context=3 if number % 3 == 2 else None)
        depth = chosen_depth(tiny("llama"), ask)
        depths.append(depth)
        sent = replace(ask, options={}) if default else ask
        request_id = made.add(sent, runs_as=fixed(ask, depth))
        assert outcome(made, request_id) == (depth, PREDICTOR_PRICE)
        made.add(fixed(ask, depth))
        made.step()
    assert len(set(depths)) > 2
    finish(made)
    assert made.cache_hits > 0


@both
def test_a_preemption_does_not_ask_the_predictor_again(tiny: Callable[[str], Tiny], asynchronous: bool) -> None:
    """Fails if a request that starts again takes the price of that moment: its tokens so far ran at another depth."""
    made = pretend(
        tiny,
        asynchronous=asynchronous,
        num_blocks=FEW_BLOCKS,
        load={"price": LOAD_PRICE, "running": [1, 2]},
        auto={"price": 0.0},
    )
    first = made.add(auto(PROMPTS[0], 60), runs_as=fixed(auto(PROMPTS[0], 60), NUM_LAYERS))
    for prompt in PROMPTS[1:4]:
        made.add(Ask(prompt, 0.5, 60))
    for step in range(20):
        made.step()
        if step in (5, 12):
            assert made.scheduler._auto.chooser.level == 1
            made.preempt(0, drop_stale_output=False)
    assert made.scheduler.requests[first].num_preemptions > 0
    assert outcome(made, first) == (NUM_LAYERS, 0.0)
    finish(made)


@both
@pytest.mark.parametrize("signal", ["waiting", "running", "kv_use"])
def test_load_raises_the_price_and_it_falls_back(tiny: Callable[[str], Tiny], asynchronous: bool, signal: str) -> None:
    """Fails if a signal is not read from the scheduler, explicit budgets follow it, or the price stays up after it."""
    load: dict[str, Any] = {"price": LOAD_PRICE}
    load |= {"running": [1, 4]} if signal == "running" else {}
    if signal == "kv_use":
        load |= {"kv_use": [0.02, 0.04]}
    if signal != "waiting":
        load["waiting"] = [50, 60]
    made = pretend(tiny, asynchronous=asynchronous, load=load)
    calm = chosen_depth(tiny("llama"), auto(PROMPTS[0]))
    loaded = chosen_depth(tiny("llama"), auto(PROMPTS[0]), LOAD_PRICE)
    assert loaded < calm

    def send_auto() -> tuple[int, float | None]:
        request_id = made.add(auto(PROMPTS[0]))
        got = outcome(made, request_id)
        made.expect(request_id, fixed(auto(PROMPTS[0]), got[0]))
        return got

    assert send_auto() == (calm, PREDICTOR_PRICE)
    finish(made)
    explicit = [made.add(Ask(prompt, 1.0, 40)) for prompt in PROMPTS[1:10]]
    if signal != "waiting":
        for _ in range(25):
            made.step()
    assert send_auto() == (loaded, LOAD_PRICE)
    assert [outcome(made, request_id) for request_id in explicit] == [(NUM_LAYERS, None)] * 9
    finish(made)
    assert made.scheduler._auto.chooser.level == 0
    assert send_auto() == (calm, PREDICTOR_PRICE)
    finish(made)


@both
def test_an_abort_of_everything_leaves_no_load(tiny: Callable[[str], Tiny], asynchronous: bool) -> None:
    """Fails if the gauges of a server whose clients went away show their load for good: no request follows to tell."""
    from vllm.v1.request import RequestStatus

    made = pretend(tiny, asynchronous=asynchronous, load={"price": LOAD_PRICE, "running": [0, 2]})
    for prompt in PROMPTS[:4]:
        made.add(Ask(prompt, 0.5, 40))
    for _ in range(3):
        made.step()
    assert made.scheduler._auto.chooser.level == 1
    made.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    while not made.idle:
        made.step()
    assert made.scheduler._auto.chooser.level == 0


def test_the_metrics_show_load_price_and_choices(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a server under load looks idle in /metrics, or an idle one loaded, or numbers count as chosen."""
    made = pretend(tiny, asynchronous=False, load={"price": LOAD_PRICE, "running": [0, 4]})
    shown = ShownMetrics(made.config)
    assert (shown.value("load"), shown.value("auto_price")) == (0, PREDICTOR_PRICE)
    depth = chosen_depth(tiny("llama"), auto(PROMPTS[0], 30))
    for number, prompt in enumerate(PROMPTS[:2]):
        ask = auto(prompt, 30) if number == 0 else Ask(prompt, 1.0, 30)
        made.add(ask, runs_as=fixed(ask, depth) if number == 0 else None)
    made.step()
    shown.take(made)
    assert (shown.value("load"), shown.value("auto_price")) == (0.5, (PREDICTOR_PRICE + LOAD_PRICE) / 2)
    finish(made)
    shown.take(made)
    assert (shown.value("load"), shown.value("auto_price")) == (0, PREDICTOR_PRICE)
    assert (shown.value("auto_budget_count"), shown.value("budget_count")) == (1, 2)
    assert shown.value("auto_budget_sum") == budget_for_depth(depth, NUM_LAYERS)


@both
@layouts
def test_a_rising_load_lowers_requests_that_run(tiny: Callable[[str], Tiny], asynchronous: bool, layout: str) -> None:
    """Fails if requests of a calm minute stay deep in a busy one, numbers are touched, or a block that holds tokens of
    the lower depth is found by one who runs the depth before."""
    made = pretend(
        tiny,
        asynchronous=asynchronous,
        load={"price": LOAD_PRICE, "running": [2, 4], "lowers_running": True},
        auto={"price": 0.0},
        kv_layout=layout,
    )
    scheduler = made.scheduler
    first = made.add(auto(PROMPTS[0], 60), runs_as=fixed(auto(PROMPTS[0], 60), NUM_LAYERS))
    number = made.add(Ask(PROMPTS[1], 1.0, 60))
    for _ in range(25):
        made.step()
    route = scheduler._routed[first].route
    assert not route.lowered
    assert route.depth == NUM_LAYERS
    others = [made.add(Ask(prompt, 0.5, 30)) for prompt in PROMPTS[2:6]]
    for _ in range(6):
        made.step()
    assert [depth for _, depth in route.lowered][-1:] == [PREDICTOR_DEPTHS[0]]
    assert all(len(PROMPTS[0]) < position for position, _ in route.lowered)
    assert not scheduler._routed[number].route.lowered
    told = scheduler._routed[first].outcome.as_dict(route)
    assert (told["depth"], told["lowered_to"]) == (NUM_LAYERS, PREDICTOR_DEPTHS[0])
    made.preempt(0, drop_stale_output=False)
    while not made.idle:
        made.step()
    for request_id in (number, *others):
        assert made.generated[request_id] == made.expected(made.asks[request_id])
    follow_up = made.add(Ask((*PROMPTS[0], *made.generated[first]), 1.0, 4))
    while not made.idle:
        made.step()
    assert made.generated[follow_up] == made.expected(made.asks[follow_up])


@both
@layouts
def test_a_request_that_is_computed_again_is_lowered_once_it_is_done(
    tiny: Callable[[str], Tiny], asynchronous: bool, layout: str
) -> None:
    """Fails if a rising load lowers a request between two chunks of tokens that it has generated before a preemption:
    they ran at its old depth, and positions would be out of order."""
    load = {"price": LOAD_PRICE, "running": [1, 3], "waiting": [0, 2], "lowers_running": True}
    made = pretend(tiny, asynchronous=asynchronous, chunk=16, load=load, auto={"price": 0.0}, kv_layout=layout)
    prompt, others = PROMPTS[0], PROMPTS[1:5]
    first = made.add(auto(prompt, 120), runs_as=fixed(auto(prompt, 120), NUM_LAYERS))
    step_until(made, lambda: len(made.generated[first]) >= 60)
    made.scheduler.reset_prefix_cache(reset_running_requests=True)
    request, route = made.scheduler.requests[first], made.scheduler._routed[first].route
    step_until(made, lambda: len(prompt) < request.num_computed_tokens < len(prompt) + 50)
    for other in others:
        made.add(Ask(other[:3], 0.5, 100))
    step_until(made, lambda: bool(route.lowered))
    assert route.lowered[0][0] >= len(prompt) + 59
    step_until(made, lambda: made.idle)
    assert len(made.generated[first]) == 120


def test_a_request_that_is_computed_again_is_not_lowered_where_accepted_drafts_ran(
    tiny: Callable[[str], Tiny],
) -> None:
    """Fails if the engine ends, or tokens of which a client has been told paths run others: accepted drafts are not
    among the tokens that were planned."""
    made = pretend(tiny, asynchronous=False, slo={"itl_ms": 1e6}, auto={"price": 0.0})
    first = made.add(auto(PROMPTS[0], 60), runs_as=fixed(auto(PROMPTS[0], 60), NUM_LAYERS))
    step_until(made, lambda: len(made.generated[first]) >= 20)
    request, routed = made.scheduler.requests[first], made.scheduler._routed[first]

    def lowered_at(price: float) -> list[tuple[int, int]]:
        made.scheduler._auto.chooser._scale_price = price
        made.scheduler._auto.lower([(request, routed)])
        return routed.route.lowered

    position, price = request.num_computed_tokens, 0.1
    while not lowered_at(price):
        price *= 1.1
    before = [*routed.route.lowered]
    assert before[0][0] == position
    assert before[0][1] > PREDICTOR_DEPTHS[0]
    routed.planned, request.num_computed_tokens = position - 4, position - 2  # computed again, as far as this
    assert lowered_at(1e3) == before
    request.num_computed_tokens = position
    assert lowered_at(1e3)[-1] == (position, PREDICTOR_DEPTHS[0])


def pace(made: PretendEngine, layer_s: float) -> None:
    """Let the clock of latencies go on by a time for each layer of the deepest request of a step."""
    scheduler, now, schedule = made.scheduler, [time.perf_counter()], made.scheduler.schedule
    scheduler._auto.meter = LatencyMeter(lambda: now[0])

    def paced() -> Any:
        output = schedule()
        routes = {req_id: routed.route for req_id, routed in scheduler._routed.items()}
        for new in output.scheduled_new_reqs:  # the depth of "auto" is the one of this moment
            if made.asks[new.req_id].options:
                made.expect(new.req_id, fixed(made.asks[new.req_id], routes[new.req_id].depth))
        now[0] += layer_s * max((routes[req_id].depth for req_id in output.num_scheduled_tokens), default=0)
        return output

    scheduler.schedule = paced


@both
@layouts
def test_a_missed_objective_lowers_what_runs_and_what_waits(
    tiny: Callable[[str], Tiny], asynchronous: bool, layout: str
) -> None:
    """Fails if latencies are measured wrongly, a request that waited runs the depth of the calm before, numbers are
    touched, or a block is found that another path made."""
    made = pretend(tiny, asynchronous=asynchronous, slo={"itl_ms": 25.0}, auto={"price": 0.0}, kv_layout=layout)
    scheduler = made.scheduler
    pace(made, layer_s=0.01)  # the fewest layers take 30 ms
    scheduler.max_num_running_reqs = scheduler.max_num_active_reqs = 6
    autos = [made.add(auto(prompt, 60)) for prompt in PROMPTS[:9]]
    number = made.add(Ask(PROMPTS[9], 0.5, 60))
    calm = {request_id: outcome(made, request_id) for request_id in autos}
    assert set(calm.values()) == {(NUM_LAYERS, 0.0)}
    step_until(made, lambda: scheduler._auto.chooser.level == 1)
    running = [request.request_id for request in scheduler.running if request.request_id in autos]
    assert 0 < len(running) < len(autos)
    routes = [scheduler._routed[request_id].route for request_id in running]
    step_until(made, lambda: all(route.depth == PREDICTOR_DEPTHS[0] for route in routes))
    assert routes[0].lowered
    depths: dict[str, int] = {}
    while not made.idle:
        depths |= {request_id: outcome(made, request_id)[0] for request_id in autos if request_id in scheduler._routed}
        made.step()
    assert depths[running[0]] == NUM_LAYERS
    assert all(depths[request_id] == PREDICTOR_DEPTHS[0] for request_id in autos if request_id not in running)
    assert all(len(tokens) == 60 for tokens in made.generated.values())
    assert made.generated[number] == made.expected(made.asks[number])
    assert scheduler._auto.chooser.objectives.observed_s["itl"] == pytest.approx(0.08)
    assert (scheduler._auto.chooser.level, scheduler._auto.chooser.price) == (0, 0)


def test_a_request_with_a_salt_of_its_own_keeps_it_when_its_depth_changes(tiny: Callable[[str], Tiny]) -> None:
    """Fails if a depth that is chosen again drops the user's salt from the prefix cache, or adds to the old one."""
    made = pretend(tiny, asynchronous=False, slo={"ttft_ms": 100.0}, auto={"price": 0.0})
    scheduler = made.scheduler
    scheduler._auto.meter = LatencyMeter(itertools.count(time.perf_counter()).__next__)  # a second later at each look
    request_id = made.add(auto(PROMPTS[0], 4))
    request, routed = scheduler.requests[request_id], scheduler._routed[request_id]
    assert routed.route.depth == NUM_LAYERS
    request.cache_salt = "mine"
    scheduler._observe_load(idle=False)
    scheduler._choose_again_for_waiting()
    depth = routed.route.depth
    assert depth == routed.outcome.depth < NUM_LAYERS
    assert request.cache_salt == ("mine", f"{scheduler._salt_prefix}:{routed.route.cache_key}")
    scheduler._auto.chooser.observe_latencies(Latencies(1e6), idle=True)
    scheduler._choose_again_for_waiting()
    assert routed.route.depth == NUM_LAYERS
    assert request.cache_salt == "mine"


def test_the_metrics_show_objectives(tiny: Callable[[str], Tiny]) -> None:
    """Fails if an operator cannot see an objective, what was observed of it, or that it is out of reach."""
    made = pretend(tiny, asynchronous=False, slo={"itl_ms": 5.0, "ttft_ms": 1e6}, auto={"price": 0.0})
    shown = ShownMetrics(made.config)
    assert shown.value("slo_objective_seconds", objective="itl") == 0.005
    assert shown.value("slo_objective_seconds", objective="ttft") == 1000
    assert math.isnan(shown.value("slo_observed_seconds", objective="itl") or 0.0)
    objectives = made.scheduler._auto.chooser.objectives
    start = time.perf_counter()
    for step in range(1000):
        objectives.observe(Latencies(start + 0.02 * step, itls=Counter({0.02: 1})))
    made.add(Ask(PROMPTS[0], 1.0, 4))
    made.step()
    shown.take(made)
    assert shown.value("slo_observed_seconds", objective="itl") == 0.02
    assert shown.value("slo_unreachable") == 1


# --- a real engine -----------------------------------------------------------------------------------------------


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
