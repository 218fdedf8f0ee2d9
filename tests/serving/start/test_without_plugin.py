"""`--model-impl buddy` where the plugin is switched off or broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.engine import Tiny
from tests.harness.server_config import START_TIMEOUT_S, refusal

START = """
import sys
from vllm import EngineArgs
config = EngineArgs(model=sys.argv[1], model_impl=sys.argv[2], dtype="float32", skip_tokenizer_init=True,
                    additional_config={"buddy": {"artifact": sys.argv[3]}}).create_engine_config()
print("STARTED", config.scheduler_config.scheduler_cls)
"""


def start(tiny: Tiny, model_impl: str, **environment: str) -> str:
    """Make a configuration in a process of its own; returns what it said."""
    command = [sys.executable, "-c", START, str(tiny.folder), model_impl, str(tiny.artifact_folder)]
    environment = {**os.environ, **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    assert (result.returncode == 0) == ("STARTED" in result.stdout)
    return result.stdout + result.stderr


@pytest.mark.slow
def test_switched_off_it_refuses_buddy_and_nothing_else(llama_model: Tiny) -> None:
    """Fails if `--model-impl buddy` serves the stock model where the plugin is switched off."""
    said = start(llama_model, "buddy", VLLM_BUDDY_DISABLE="1")
    assert "STARTED" not in said
    assert "VLLM_BUDDY_DISABLE" in said
    assert "STARTED None" in start(llama_model, "auto", VLLM_BUDDY_DISABLE="1")


def test_a_plugin_that_fails_to_load_refuses_buddy_and_nothing_else(llama_model: Tiny, tmp_path: Path) -> None:
    """Fails if `--model-impl buddy` serves the stock model where the plugin cannot be imported."""
    # A module that shadows one the plugin needs, as a broken installation would.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['vllm_buddy.serving.patches'] = None\n")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    said = start(llama_model, "buddy", PYTHONPATH=path)
    assert "STARTED" not in said
    assert "failed to load" in said
    assert "vllm-buddy doctor" in said
    assert "STARTED None" in start(llama_model, "auto", PYTHONPATH=path)


def test_patches_that_fail_halfway_refuse_buddy(llama_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if one patch is in place and the other is not: budgets would go unchecked."""
    from vllm.model_executor.models.registry import _ModelRegistry
    from vllm.plugins import load_general_plugins

    from vllm_buddy.serving import patches, plugin

    load_general_plugins()  # vLLM loads plugins once, and what fails below must not be that once

    def fail() -> None:
        raise ImportError("moved")

    monkeypatch.setattr(patches, "wrap_verify", fail)
    monkeypatch.setattr(_ModelRegistry, "_normalize_arch", _ModelRegistry._normalize_arch)
    plugin.register()
    assert "moved" in refusal(llama_model)
