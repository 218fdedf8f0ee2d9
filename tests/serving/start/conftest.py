"""The tiny Llama, artifacts of it, and what the plugin logs."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.harness.engine import Tiny
from tests.harness.tiny_models import (
    random_artifact,
)


@pytest.fixture
def llama_model(tiny: Callable[[str], Tiny]) -> Tiny:
    return tiny("llama")


@pytest.fixture
def artifact_copy(llama_model: Tiny, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return shutil.copytree(llama_model.artifact_folder, tmp_path / "artifact")


@pytest.fixture
def few_depths(llama_model: Tiny, tmp_path: Path) -> Path:
    """An artifact whose library has paths of 3, 4 and 6 layers alone."""
    sets = {3: [[0, 2, 7]], 4: [[0, 2, 3, 7]], 6: [[0, 1, 2, 3, 4, 7]]}
    config = llama_model.artifact.config.model_copy(update={"library": sets})
    replace(llama_model.artifact, config=config).save(folder := tmp_path / "narrow")
    return folder


@pytest.fixture(scope="module")
def without_predictor(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> str:
    """An artifact of the tiny Llama that chooses no budgets."""
    folder = tmp_path_factory.mktemp("without") / "plain"
    random_artifact(folder, tiny("llama").folder)
    return str(folder)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the plugin logs."""
    # vLLM sets up logging anew with an engine's configuration, and takes handlers off.
    monkeypatch.setattr("vllm.engine.arg_utils.configure_logging_if_needed", lambda *_: None)
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.vllm_buddy")
    level = logger.level
    logger.setLevel(logging.INFO)  # other tests may have made vLLM quieter
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)
