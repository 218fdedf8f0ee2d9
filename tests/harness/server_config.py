"""Configurations of a server, as `vllm serve` makes them before it starts any process."""

import json
from typing import Any

import pytest

from tests.harness.engine import Tiny
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS

START_TIMEOUT_S = 300.0  # importing vLLM takes 5 s on an idle core
BASE = {
    "model_impl": "buddy",
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "max_model_len": 512,
    "enforce_eager": True,
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
DRAFTS = {"method": "custom_class", "model": DEPTH_DRAFTS, "num_speculative_tokens": 3}


def configure(tiny: Tiny, buddy: Any = None, **options: Any) -> Any:
    """The engine's configuration, as a server makes it before it starts any process."""
    from vllm import EngineArgs

    settings = {"artifact": str(tiny.artifact_folder)} | (buddy or {})
    options = {**BASE, "model": str(tiny.folder), "additional_config": {"buddy": settings}, **options}
    return EngineArgs(**options).create_engine_config()


def refusal(tiny: Tiny, buddy: Any = None, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        configure(tiny, buddy, **options)
    return str(caught.value)


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options of vLLM's engine as arguments of its server."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return found
