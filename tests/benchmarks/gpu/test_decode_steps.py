"""Tests the decode benchmark for GPUs: its engines, the figures that it shows, and a whole run on the CPU."""

import argparse
import json
from pathlib import Path
from subprocess import CalledProcessError
from typing import Any

import pytest

from benchmarks.gpu import decode_steps
from benchmarks.gpu.decode_plan import (
    QUICK,
    SMOLLM2,
    Plan,
    Subject,
    add_gpu_options,
    drawn_subject,
    plan_of,
    refuse_gpu_options,
)
from benchmarks.gpu.decode_steps import Figures
from benchmarks.gpu.engine_agreement import Outputs
from benchmarks.gpu.engine_job import NO_BYPASS, EngineJob
from benchmarks.gpu.model_shapes import LLAMA_8B, ModelShape
from benchmarks.harness.rounds import Refused
from tests.benchmarks.gpu.test_engine_agreement import BUDDIES, PEERS, found, right_outputs

TINY = ModelShape(
    "tiny",
    {
        **LLAMA_8B.config,
        "num_hidden_layers": 8,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": None,
    },
)
PLAN = Plan(("tiny",), ((1, 24), (3, 24)), steps=4, repeats=2, budgets=(1.0, 0.5))


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    return drawn_subject(TINY, tmp_path)


# --- options -------------------------------------------------------------------------------------------------------


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--out", type=Path)
    add_gpu_options(parser)
    args = parser.parse_args(options)
    return args


def test_options_make_the_plan() -> None:
    """Fails if an option is ignored or a default is not what the documentation says."""
    plan = plan_of(parsed())
    assert plan.shapes == [LLAMA_8B.name, "Qwen2.5-7B-Instruct", SMOLLM2]
    assert len(plan.runs) == 8
    assert (plan.steps, plan.repeats) == (64, 5)
    assert plan_of(parsed("--only-quick")) == QUICK
    plan = plan_of(parsed("--batch", "2", "--context", "64", "128", "--tokens", "7", "--shapes", SMOLLM2))
    assert (list(plan.runs), plan.steps, plan.shapes) == ([(2, 64), (2, 128)], 7, [SMOLLM2])


def test_options_of_the_gpu_are_refused_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Fails if `--only-quick` without `--device cuda` starts the long benchmark of the CPU."""
    with pytest.raises(SystemExit):
        refuse_gpu_options(argparse.ArgumentParser(), parsed("--only-quick"))
    assert "--only-quick is for --device cuda alone" in capsys.readouterr().err
    refuse_gpu_options(argparse.ArgumentParser(), parsed())


def test_without_a_gpu_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing GPU is noticed only after a model has been made, or as a traceback of vLLM."""
    monkeypatch.setattr(decode_steps, "device", lambda: "cpu")
    with pytest.raises(Refused, match="finds no CUDA device"):
        decode_steps.run(parsed())


# --- engines -------------------------------------------------------------------------------------------------------


def test_peers_have_the_layers_of_buddys_path(subject: Subject) -> None:
    """Fails if the peer runs other layers, or other weights, than buddy."""
    buddy, stock, pruned = subject.jobs(PLAN)
    assert (buddy.name, stock.name, pruned.name) == ("buddy", *PEERS)
    router = subject.artifact.router()
    context = router.new_context()
    assert context is not None
    context.extend([300, 400])
    path = router.path(context, subject.depth(0.5))
    assert pruned.layers == [layer for layer in range(8) if path >> layer & 1]
    assert len(pruned.layers or ()) == 4
    assert json.loads((Path(pruned.model) / "config.json").read_text())["num_hidden_layers"] == 4
    assert buddy.layers == stock.layers == list(range(8))
    assert buddy.model == stock.model
    assert EngineJob(**json.loads(buddy.as_json())).budgets == [1.0, 0.5]


def test_variants_are_named_as_engines_name_them(subject: Subject) -> None:
    """Fails if figures are looked up under names that no engine uses, so that the table stays empty."""
    assert [variant.name for variant in subject.variants(PLAN.budgets)] == [*PEERS, *BUDDIES]


# --- figures -------------------------------------------------------------------------------------------------------


def filled(subject: Subject, outputs: Outputs) -> Figures:
    figures = Figures(subject, Plan(("tiny",), ((1, 24),), steps=4, repeats=2, budgets=(1.0, 0.5)), outputs)
    for job in subject.jobs(figures.plan):
        figures.add(job, {"kind": "engine", "async_scheduling": True, "kv_tokens": 1, "start_s": 1.0})
        for variant, step_ms in {
            "buddy": {"buddy 1.0": [5.0, 5.0], "buddy 0.5": [4.0, 2.0], "buddy 0.5" + NO_BYPASS: [2.0, 2.0]},
            "stock": {"stock": [4.0, 8.0]},
            "pruned 0.5": {"pruned 0.5": [2.0, 2.0]},
        }[job.name].items():
            share = [0.01, 0.02] if job.name == "buddy" else None
            about = {"kind": "run", "variant": variant, "batch": 1, "context": 24}
            figures.add(job, {**about, "step_ms": step_ms, "routing_share": share})
    return figures


def test_ratios_are_of_equal_repeats(subject: Subject) -> None:
    """Fails if a ratio is upside down, or pairs repeats of different lengths."""
    figures = filled(subject, right_outputs())
    rows = {(row["variant"], row["metric"]): row for row in figures.rows()}
    assert rows["buddy 0.5", "ratio_to_stock"]["p50"] == 2.5  # 1 and 4
    assert rows["buddy 0.5", "ratio_to_pruned"]["p50"] == 0.75  # 0.5 and 1
    assert rows["buddy 1.0", "ratio_to_pruned"]["p50"] == rows["buddy 1.0", "ratio_to_stock"]["p50"]
    assert rows["buddy 0.5", "routing_share"]["p50"] == 0.015
    assert rows["stock", "ms_per_step"]["n"] == 2
    assert ("stock", "routing_share") not in rows
    assert rows["pruned 0.5", "ms_per_step"]["layers"] == 4
    assert {row["scheduling"] for row in figures.rows()} == {"async"}
    assert figures.refused() == []


def test_a_failed_check_takes_figures_away(subject: Subject) -> None:
    """Fails if a figure of a variant that computes something else is written, or its refusal is not reported."""
    outputs = right_outputs()
    outputs.add("buddy 1.0", 1, found(50))
    figures = filled(subject, outputs)
    shown = {(row["variant"], row["metric"]) for row in figures.rows()}
    assert not {"stock", "buddy 1.0"} & {variant for variant, _ in shown}
    assert ("buddy 0.5", "ratio_to_pruned") in shown
    assert ("buddy 0.5", "ratio_to_stock") not in shown
    assert any(line.startswith("stock, batch 1") for line in figures.refused())


def test_what_does_not_fit_is_not_asked_of_the_others(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a run without a peer is timed, or an engine that dies ends the whole benchmark."""
    asked = []

    def lines_of(job: EngineJob) -> Any:
        asked.append((job.name, list(job.runs)))
        if job.name == "stock":
            raise CalledProcessError(3, "engine")
        yield {"kind": "left out", "batch": 3, "context": 24, "why": "too long"}

    monkeypatch.setattr(decode_steps, "lines_of", lines_of)
    figures = Figures(subject, PLAN)
    for job in subject.jobs(PLAN):
        figures.take(job)
    assert asked == [("buddy", [(1, 24), (3, 24)]), ("stock", [(1, 24)]), ("pruned 0.5", [(1, 24)])]
    assert "the engine of 'stock' ended with status 3" in figures.refused()


@pytest.mark.slow
def test_whole_run_on_the_cpu(subject: Subject) -> None:
    """Fails if an engine cannot be driven as on a GPU, or its outputs are not those of its peer."""
    options = {
        "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": 32 << 20,
        "block_size": 32,
    }  # fmt: skip
    plan = Plan(("tiny",), (*PLAN.runs, (3, 1024)), steps=4, repeats=2, budgets=(1.0, 0.5), options=options)
    figures = Figures(subject, plan)
    for job in subject.jobs(plan):
        figures.take(job)
    assert figures.refused() == []
    assert figures.runs == [(1, 24), (3, 24)]  # 1024 tokens are more than 512 positions
    rows = {(row["variant"], row["batch"]): row for row in figures.rows() if row["metric"] == "ms_per_step"}
    assert set(rows) == {(variant, batch) for variant in (*PEERS, *BUDDIES) for batch in (1, 3)}
    shares = [row["p50"] for row in figures.rows() if row["metric"] == "routing_share"]
    assert shares
    assert all(0 < share < 1 for share in shares)
