"""The plan: all paths of one engine step. Made by the scheduler, sent to every worker with its output."""

from typing import NamedTuple

from vllm_buddy.method import LayerPath, Run


class RequestPlan(NamedTuple):
    """What one request executes in this step.

    runs: cover the tokens scheduled for it, in order.
    cached_path: set when the request starts, or starts again after a preemption: the one path that all its
        tokens found in the prefix cache have executed. None while it goes on.
    """

    runs: tuple[Run, ...]
    cached_path: LayerPath | None


StepPlan = dict[str, RequestPlan]

# The attribute of vLLM's SchedulerOutput, and of its ModelRunnerOutput on the way back.
PLAN_ATTRIBUTE = "buddy_plan"
EXECUTED_ATTRIBUTE = "buddy_executed"


class Executed(NamedTuple):
    """Layers that a request's tokens really executed in one step, counted where they ran."""

    num_tokens: int
    total: int
    fewest: int
    most: int
