"""Ordinary features of vLLM on one routed server: the quick cases of `python -m tools.compatibility`."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.harness.tiny_models import PREDICTOR_DEPTHS, random_artifact, save_tiny_model
from tools.compatibility import PAGE
from tools.features.case import Case, all_cases
from tools.features.client import BUDGETS, Client
from tools.features.servers import client, server
from tools.features.starts import STARTS
from tools.fuzzing import requests
from vllm_buddy.cli.server_process import ServerProcess
from vllm_buddy.models.embedded import fetch

# The tool runs all cases on SmolLM2 and compares budget 1.0 with stock vLLM. Weights do not matter here.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
VOCAB_SIZE = 49152


@dataclass(frozen=True)
class Served:
    """A server and its model."""

    process: ServerProcess
    model: Path

    def ask(self, budget: float | str) -> Client:
        """A client at this budget."""
        return client(self.process, self.model, budget)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One routed server of a tiny random model with SmolLM2's tokenizer."""
    root = tmp_path_factory.mktemp("features")
    model = save_tiny_model(root / "model", "llama", hidden_size=64, num_attention_heads=2, vocab_size=VOCAB_SIZE)
    source = fetch(folder=root / "smollm2")
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, model / name)
    random_artifact(root / "artifact", model, bypass_rank=4, predictor_depths=PREDICTOR_DEPTHS)
    with server(model, root / "log", artifact=str(root / "artifact")) as process:
        yield Served(process, model)


def cases() -> list[object]:
    """All cases at all budgets. At 1.0 all are slow: the tool compares them with stock vLLM."""
    return [
        pytest.param(c, b, id=f"{c.name} {b}", marks=[pytest.mark.slow] if c.slow or b == 1.0 else [])
        for c in all_cases()
        for b in BUDGETS
    ]


@pytest.mark.parametrize(("case", "budget"), cases())
def test_a_feature_works_at_a_budget(served: Served, case: Case, budget: float | str) -> None:
    """Fails if something that works on stock vLLM stops working with routing on, or takes the server with it."""
    case.run(served.ask(budget))
    assert served.ask(budget).get("/health")[0] == 200


def test_random_requests_are_answered_and_leave_nothing_behind(served: Served) -> None:
    """Fails if a request gets HTTP 500, hangs, or changes what the next one gets. `python -m tools.fuzz` sends more."""
    statuses = requests.fuzz(served.ask(0.75), 60)
    assert statuses[200] > 5
    assert statuses[400] > 5


def test_many_salts_and_budgets_leave_metrics_and_memory_as_they_were(served: Served) -> None:
    """Fails if a client can make the server keep something for each salt or budget that it invents."""
    requests.flood(served.ask(0.75), 200, served.process.pid)


def test_the_page_lists_every_case_and_every_start() -> None:
    """Fails if a case was added, renamed or removed and the page was not written again."""
    rows = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    listed = [row for row in rows if row not in ("---", "feature", "start")]
    assert sorted(listed) == sorted([case.name for case in all_cases()] + [start.name for start in STARTS])


def test_every_case_has_its_own_name() -> None:
    """Fails if a row of the page could be either of two cases."""
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names))
