"""What `/metrics` shows of budget "auto": load, price, choices and objectives."""

import math
import time
from collections import Counter
from collections.abc import Callable

from tests.harness.auto_requests import LOAD_PRICE, PROMPTS, auto, chosen_depth, finish, fixed, pretend
from tests.harness.engine import Ask, Tiny
from tests.harness.shown_metrics import ShownMetrics
from tests.harness.tiny_models import NUM_LAYERS, PREDICTOR_DEPTHS, PREDICTOR_PRICE
from vllm_buddy.method import budget_for_depth
from vllm_buddy.serving.admission.latency import Latencies


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


def test_the_metrics_show_objectives(tiny: Callable[[str], Tiny]) -> None:
    """Fails if an operator cannot see an objective, what was observed of it, or that it is out of reach."""
    made = pretend(tiny, asynchronous=False, slo={"itl_ms": 5.0, "ttft_ms": 1e6}, auto={"price": 0.0})
    shown = ShownMetrics(made.config)
    assert shown.value("slo_objective_seconds", objective="itl") == 0.005
    assert shown.value("slo_objective_seconds", objective="ttft") == 1000
    assert math.isnan(shown.value("slo_observed_seconds", objective="itl") or 0.0)
    assert shown.value("slo_largest_budget") == 1
    objectives = made.scheduler._auto.chooser.objectives
    start = time.perf_counter()
    for step in range(1000):
        objectives.observe(Latencies(start + 0.02 * step, itls=Counter({0.02: 1})))
    made.add(Ask(PROMPTS[0], 1.0, 4))
    made.step()
    shown.take(made)
    assert shown.value("slo_observed_seconds", objective="itl") == 0.02
    assert shown.value("slo_unreachable") == 1
    assert shown.value("slo_largest_budget") == budget_for_depth(PREDICTOR_DEPTHS[0], NUM_LAYERS)
