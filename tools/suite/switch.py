"""A general plugin of vLLM that makes every engine a routed one: in tests, and in the servers that tests start.

It is linked into a folder on PYTHONPATH, beside an entry point that names it (environment.py), so that each process of
vLLM loads it. It imports nothing of this package.
"""

import functools
import json
import os
from typing import Any

BUDGET_VARIABLE = "VLLM_SUITE_BUDGET"  # the default budget; unset: stock vLLM
_REPORT_VARIABLE = "VLLM_SUITE_REPORT"  # report.py's: the file that each routed engine writes a line to
_ARTIFACT = "smollm2-135m"


def register() -> None:
    """Let EngineArgs that name no implementation of the model ask for routing. Idempotent."""
    from vllm.engine.arg_utils import EngineArgs

    create = EngineArgs.create_engine_config
    budget = os.environ.get(BUDGET_VARIABLE)
    if budget is None or hasattr(create, "__wrapped__"):
        return

    @functools.wraps(create)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if self.model_impl == "auto":
            self.model_impl = "buddy"
            settings = {"artifact": _ARTIFACT, "default_budget": float(budget)}
            self.additional_config = {"buddy": settings, **self.additional_config}
        config = create(self, *args, **kwargs)
        if config.model_config.model_impl == "buddy":
            with open(os.environ[_REPORT_VARIABLE], "a") as file:
                file.write(json.dumps({"engine": config.model_config.architecture}) + "\n")
        return config

    EngineArgs.create_engine_config = create_engine_config
