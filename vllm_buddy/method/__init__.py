"""The routing method: decides from token ids which layers a token executes. Uses torch and numpy, never vLLM or Triton.

`budget.py`, `path.py`, `context.py`, `decision.py`, `router.py`, `predictor.py` and `request_route.py` make the
decision, `token_router.py` for single tokens. `bypass.py` and `lora.py` repair the output of a model that skips layers,
`exit_adapter.py` the drafts of a path of few layers, of which `draft_head.py` says the tokens. `byte_grid.py` rounds
weights to 8 bits, and `kv_policy.py` names what a skipped layer leaves in the KV cache. `reference.py`, `batched.py`
and `forked.py` run a Hugging Face model along given paths, the last two also with weights that processes share
(`sharded.py`).
"""

from vllm_buddy.method.budget import budget_for_depth, depth_for_budget, parse_budget, runs_enough, smallest_budget
from vllm_buddy.method.context import Context
from vllm_buddy.method.decision import DecisionModule, FoldedDecision
from vllm_buddy.method.exit_adapter import DraftExit, ExitAdapter
from vllm_buddy.method.path import LayerPath, full_path, layers_of, path_of, top_k_path
from vllm_buddy.method.predictor import BudgetPredictor, FoldedPredictor
from vllm_buddy.method.request_route import PathSchedule, RequestRoute, Route, Run, SplitRoute
from vllm_buddy.method.router import Router
from vllm_buddy.method.token_router import TokenRoute, TokenRouter, TokenSchedule

__all__ = [
    "BudgetPredictor",
    "Context",
    "DecisionModule",
    "DraftExit",
    "ExitAdapter",
    "FoldedDecision",
    "FoldedPredictor",
    "LayerPath",
    "PathSchedule",
    "RequestRoute",
    "Route",
    "Router",
    "Run",
    "SplitRoute",
    "TokenRoute",
    "TokenRouter",
    "TokenSchedule",
    "budget_for_depth",
    "depth_for_budget",
    "full_path",
    "layers_of",
    "parse_budget",
    "path_of",
    "runs_enough",
    "smallest_budget",
    "top_k_path",
]
