"""The LM evaluation harness's own vLLM model runs the plugin."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.tiny_models import random_artifact
from tests.importance.conftest import model_with_tokenizer
from vllm_buddy.cli.main import main

pytestmark = pytest.mark.slow

__all__ = ["model_with_tokenizer"]

ROWS = [
    {"goal": f"Question {i}", "sol1": "Do this, then that.", "sol2": "Do nothing" + "!" * i, "label": i % 2}
    for i in range(20)
]
TASK = r"""
task: local_piqa
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
HARNESS = (
    "from vllm_buddy.cli.serve import answer_for_vllm_cpu; answer_for_vllm_cpu()\n"
    "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
)


def test_harness_gives_the_figures_of_eval(model_with_tokenizer: Path, tmp_path: Path) -> None:
    """Failure: the harness runs stock vLLM, another budget, or scores the questions in another form than `eval`."""
    pytest.importorskip("lm_eval", reason="the LM evaluation harness is not installed")
    # No Decision Module: the harness cannot say which tokens are context.
    random_artifact(tmp_path / "artifact", model_with_tokenizer, decision=False, bypass_rank=4)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local_piqa.yaml").write_text(TASK.format(file=rows))
    model_args = {
        "pretrained": str(model_with_tokenizer),
        "model_impl": "buddy",
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "kv_cache_memory_bytes": 64 << 20,
        "additional_config": {"buddy": {"artifact": str(tmp_path / "artifact"), "default_budget": 0.5}},
    }
    arguments = ["run", "--model", "vllm", "--model_args", json.dumps(model_args)]
    arguments += ["--include_path", str(tmp_path / "tasks"), "--tasks", "local_piqa"]
    arguments += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", HARNESS, *arguments],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    harness = json.loads(results.read_text())["results"]["local_piqa"]
    own = tmp_path / "own.json"
    options = ["--artifact", str(tmp_path / "artifact"), "--dtype", "float32", "--policy", "buddy", "--budgets", "0.5"]
    assert main(["eval", "--model", str(model_with_tokenizer), "--piqa", str(rows), "--json", str(own), *options]) == 0
    figures = {row["metric"]: row for row in json.loads(own.read_text()) if row["policy"] == "buddy"}
    for name in ("acc", "acc_norm"):
        assert harness[f"{name},none"] == pytest.approx(figures[f"piqa_{name}"]["value"])
        assert harness[f"{name}_stderr,none"] == pytest.approx(figures[f"piqa_{name}"]["stderr"])
    assert figures["piqa_acc"]["value"] not in (0.0, 1.0)
