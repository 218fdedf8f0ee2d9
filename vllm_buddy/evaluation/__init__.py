"""Measures quality by policy and budget: perplexity, multiple choice, KL and agreement with the unrouted model."""

from vllm_buddy.evaluation.engine import Engine, Scores, Task, Variant
from vllm_buddy.evaluation.eval_plan import EvalPlan, make_plan
from vllm_buddy.evaluation.eval_settings import EvalSettings
from vllm_buddy.evaluation.figures import Figure
from vllm_buddy.evaluation.hf_engine import HfEngine
from vllm_buddy.evaluation.policy import Policy, PolicySpec
from vllm_buddy.evaluation.run import evaluate
from vllm_buddy.evaluation.sample import Sample

__all__ = [
    "Engine",
    "EvalPlan",
    "EvalSettings",
    "Figure",
    "HfEngine",
    "Policy",
    "PolicySpec",
    "Sample",
    "Scores",
    "Task",
    "Variant",
    "evaluate",
    "make_plan",
]
