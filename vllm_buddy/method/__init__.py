"""The method: token ids in, paths out. Imports torch and numpy only, never vLLM or Triton."""

from vllm_buddy.method.budget import budget_for_depth, depth_for_budget, parse_budget, smallest_budget
from vllm_buddy.method.context import Context
from vllm_buddy.method.decision import DecisionModule, FoldedDecision
from vllm_buddy.method.path import LayerPath, full_path, layers_of, path_of, top_k_path
from vllm_buddy.method.predictor import BudgetPredictor, FoldedPredictor
from vllm_buddy.method.router import Router
from vllm_buddy.method.schedule import PathSchedule, RequestRoute, Run

__all__ = [
    "BudgetPredictor",
    "Context",
    "DecisionModule",
    "FoldedDecision",
    "FoldedPredictor",
    "LayerPath",
    "PathSchedule",
    "RequestRoute",
    "Router",
    "Run",
    "budget_for_depth",
    "depth_for_budget",
    "full_path",
    "layers_of",
    "parse_budget",
    "path_of",
    "smallest_budget",
    "top_k_path",
]
