"""What the scheduler counts between two steps."""

from types import SimpleNamespace

from vllm_buddy.method import Run
from vllm_buddy.serving.schedule.metrics import EngineMetrics
from vllm_buddy.serving.schedule.outcome import Outcome
from vllm_buddy.serving.schedule.plan import Executed, RequestPlan


def test_a_step_counts_the_union_of_its_paths() -> None:
    """Fails if the layers that a batch pays for are those of one request, or of all of them added up."""
    metrics = EngineMetrics(collects=True)
    plan = {
        "a": RequestPlan((Run(1, 0b10011), Run(4, 0b10101)), None),
        "b": RequestPlan((Run(1, 0b10001),), None),
    }
    metrics.observe_plan(plan)
    assert metrics.take() == {"step_layers": {"": [4]}}


def test_a_lowered_request_counts_with_what_it_ran() -> None:
    """Fails if the budgets of a busy server are shown as those that were decided before its load."""
    metrics = EngineMetrics(collects=True)
    for lowered in ([], [(9, 4)]):
        outcome = Outcome(1.0, 8, price=0.5)
        outcome.add(Executed(5, 8 * 4 + 4, 4, 8, prompt_tokens=4, prompt_total=8 * 4))
        outcome.add(Executed(1, 4, 4, 4))
        route = SimpleNamespace(lowered=lowered, num_reroutes=0, num_decisions=0)
        metrics.observe_request(outcome, route, num_layers=8)
    taken = metrics.take()
    assert taken["budget"] == taken["auto_budget"] == {"": [1.0, 0.5]}
    assert taken["layers_executed"] == {"": [40 / 6, 40 / 6]}


def test_figures_are_taken_once() -> None:
    """Fails if what one step told is told again by the next, or steps between two statistics get lost."""
    metrics = EngineMetrics(collects=True)
    for _ in range(2):
        metrics.observe_step([Executed(2, 10, 5, 5)], num_layers=8)
        metrics.observe_routing(0.25)
        metrics.show_load(0.5, 1.0)
    metrics.observe_prompt(0.62, 20, 16)
    assert metrics.take() == {
        "layer_tokens_executed": {"": [20]},
        "layer_tokens_skipped": {"": [12]},
        "routing_seconds": {"": [0.25, 0.25]},
        "load": {"": [0.5]},
        "auto_price": {"": [1.0]},
        "prompt_tokens": {"0.7": [20]},
        "prompt_tokens_cached": {"0.7": [16]},
    }
    assert metrics.take() == {}


def test_drafts_count_where_they_were_made_and_where_they_were_checked() -> None:
    """Fails if the share of drafts that were right is told wrongly, or n-grams count as drafts of layers."""
    metrics = EngineMetrics(collects=True)
    metrics.observe_drafts(Executed(1, 8, 8, 8, (8, 8, 8), drafting=12), 2)
    metrics.observe_drafts(Executed(1, 8, 8, 8, (8,) * 4, drafting=7), None)  # of n-grams
    metrics.observe_drafts(Executed(1, 8, 8, 8, (8,)), 0)
    assert metrics.take() == {
        "layer_tokens_drafting": {"": [19]},
        "depth_drafts": {"": [4]},
        "depth_drafts_accepted": {"": [2]},
    }


def test_nothing_is_kept_for_nobody() -> None:
    """Fails if an engine without statistics, whose figures nobody takes, keeps them forever."""
    metrics = EngineMetrics(collects=False)
    metrics.observe_step([Executed(2, 10, 5, 5)], num_layers=8)
    metrics.observe_plan({"a": RequestPlan((Run(1, 0b101),), None)})
    metrics.observe_routing(0.25)
    assert metrics.take() == {}
    assert metrics.routing_seconds == 0.25
