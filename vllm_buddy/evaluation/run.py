"""Runs an evaluation plan on an engine and computes figures from the scores."""

from vllm_buddy.evaluation.engine import Engine, Report, Task
from vllm_buddy.evaluation.eval_plan import EvalPlan
from vllm_buddy.evaluation.figures import Figure, choice_figures, path_figures, text_figures


def evaluate(plan: EvalPlan, engine: Engine, report: Report) -> list[Figure]:
    """Return all figures of the plan, variant by variant, the unrouted model first.

    The same tokens and questions are scored for every variant.
    """
    tasks = [Task("text", plan.windows, compare=True), Task("piqa", plan.choices, compare=False)]
    tasks = [task for task in tasks if task.samples]
    scores = {task.name: found for task, found in zip(tasks, engine.score(tasks, plan.variants, report))}
    figures: list[Figure] = []
    for index, variant in enumerate(plan.variants):
        if "text" in scores:
            figures += text_figures(variant, scores["text"][index], dense=scores["text"][0])
        if "piqa" in scores:
            figures += choice_figures(variant, scores["piqa"][index], plan.rows)
        if variant.policy.router.decision is not None:
            figures += path_figures(variant, plan.samples)
    return figures
