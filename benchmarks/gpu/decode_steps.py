"""Times decode steps on a GPU at the shapes of 7B to 8B models: `python -m benchmarks.speed.decode --device cuda`.

It compares stock vLLM at its defaults (compiled, in full CUDA graphs); stock vLLM on a model that has only the layers
of buddy's path; and buddy with and without a bypass, at its default settings. All requests of a batch run one path.

The engines do not fit into memory side by side, so each starts once, in its own process (engine_process.py), and there
are no rounds. Unlike in the other benchmarks, the times of a ratio are taken minutes apart. A repeat is the wall-clock
time of `--tokens` decode steps of the whole batch. In repeat i, requests have the same length in all variants, so
ratios are taken repeat by repeat, and their spread is that of the repeats. Stock and buddy run in the same loop, with
asynchronous scheduling where that is vLLM's default (`scheduling`). `routing_share` is the time that the host spends on
router, plan and views, divided by the time of the steps. Under asynchronous scheduling the GPU works meanwhile, so the
share is load on the host and not what a step would gain without routing.

All models but SmolLM2-135M have random weights (drawn_weights.py). The outputs of everything shown were compared in the
same run, for each batch size (engine_agreement.py).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.decode_plan import Plan, Subject, drawn_subject, plan_of, real_subject
from benchmarks.gpu.engine_agreement import Outputs, peer, refusals_by_peers, refusals_by_reference
from benchmarks.gpu.engine_job import EngineJob
from benchmarks.gpu.model_shapes import MODEL_SHAPES
from benchmarks.harness.reference_check import Reference
from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, print_rows, write_rows
from benchmarks.harness.rounds import Refused, Rounds

Row = dict[str, Any]
ROOT = Path(__file__).parents[2]
ENGINE_MODULE = "benchmarks.gpu.engine_process"


def run(args: argparse.Namespace) -> int:
    """Measure, print and write what the options ask for, and return the exit status."""
    if device() != "cuda":
        raise Refused(
            "--device cuda finds no CUDA device; without the option benchmarks.speed.decode measures on the CPU"
        )
    plan, out, env = plan_of(args), args.out or RESULTS_DIR / "cuda_decode.jsonl", environment(on="cuda")
    rows: list[Row] = []
    refused: list[str] = []
    for name in plan.shapes:
        work = Path(tempfile.mkdtemp(prefix="vllm_buddy-bench-"))
        try:
            subject = drawn_subject(MODEL_SHAPES[name], work) if name in MODEL_SHAPES else real_subject(args, work)
            figures = Figures(subject, plan)
            for job in subject.jobs(plan):
                figures.take(job)
                write_rows(out, rows + figures.rows(), env)  # so that an interruption loses no figures
        finally:
            shutil.rmtree(work, ignore_errors=True)
        print_rows(figures.rows())
        rows += figures.rows()
        refused += [f"{name}: {line}" for line in figures.refused()]
    print("".join(f"refused: {line}\n" for line in refused) + f"written to {out}", flush=True)
    return int(bool(refused))


@dataclass
class Figures:
    """Results of the engines of one model so far, and which of them may be shown.

    times: lines of engine_process.py, by batch, prompt tokens and variant. scheduling: by engine. left_out: runs that
    do not fit.
    """

    subject: Subject
    plan: Plan
    outputs: Outputs = field(default_factory=Outputs)
    times: dict[tuple[int, int, str], Mapping[str, Any]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    scheduling: dict[str, str] = field(default_factory=dict)
    left_out: set[tuple[int, int]] = field(default_factory=set)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The runs that fit into every engine so far."""
        return [run for run in self.plan.runs if run not in self.left_out]

    def take(self, job: EngineJob) -> None:
        """Start the engine of `job` and read its results. If it fails, its variants have no figures."""
        if not self.runs:
            return
        started = time.monotonic()
        print(f"=== {self.subject.name}: {job.name}", flush=True)
        try:
            for line in lines_of(replace(job, runs=self.runs)):
                self.add(job, line)
        except subprocess.CalledProcessError as error:
            self.failed.append(f"the engine of '{job.name}' ended with status {error.returncode}")
        print(f"=== {self.subject.name}: {job.name}: {time.monotonic() - started:.0f} s", flush=True)

    def add(self, job: EngineJob, line: Mapping[str, Any]) -> None:
        """Take one line of engine_process.py."""
        if line["kind"] == "engine":
            self.scheduling[job.name] = "async" if line["async_scheduling"] else "sync"
            print(f"{line['kv_tokens']} tokens of KV cache, started in {line['start_s']:.0f} s", flush=True)
        elif line["kind"] == "left out":
            self.left_out.add((line["batch"], line["context"]))
            print(f"left out: {line['batch']} x {line['context']}: {line['why']}", flush=True)
        elif line["kind"] == "outputs":
            self.outputs.add(line["variant"], line["batch"], line["found"])
        else:
            self.times[line["batch"], line["context"], line["variant"]] = line
            milliseconds = ", ".join(f"{ms:.3f}" for ms in line["step_ms"])
            print(f"{line['variant']}, {line['batch']} x {line['context']}: {milliseconds} ms a step", flush=True)

    def refused(self) -> list[str]:
        """Return why figures are missing, after all engines have run."""
        lines = list(self.failed)
        for batch in sorted({batch for batch, _ in self.runs}):
            lines += [f"{variant}, batch {batch}: {why}" for variant, why in self._refused_variants(batch).items()]
        return lines

    def rows(self) -> list[Row]:
        """Return a row per figure that has been checked."""
        return [row for batch, context in self.runs for row in self._rows_of_run(batch, context)]

    def _rows_of_run(self, batch: int, context: int) -> list[Row]:
        rounds, refused = Rounds(self.plan.repeats), self._refused_variants(batch)
        variants = [
            variant
            for variant in self.subject.variants(self.plan.budgets)
            if variant.name not in refused and (batch, context, variant.name) in self.times
        ]
        rounds.mark_checked(variant.name for variant in variants)
        for variant in variants:
            line = self.times[batch, context, variant.name]
            for repeat, step_ms in enumerate(line["step_ms"]):
                rounds.add(repeat, variant.name, ms_per_step=step_ms)
            for repeat, share in enumerate(line["routing_share"] or ()):
                rounds.add(repeat, variant.name, routing_share=share)
        shown = {variant.name for variant in variants}
        rows = []
        for variant in variants:
            figures = {"ms_per_step": rounds.values("ms_per_step", variant.name)}
            if "stock" in shown:
                figures["ratio_to_stock"] = rounds.ratio("ms_per_step", "stock", variant.name)
            if variant.budget is not None:
                its_peer = peer(variant.budget)
                if its_peer in shown:
                    figures["ratio_to_pruned"] = rounds.ratio("ms_per_step", its_peer, variant.name)
                figures["routing_share"] = rounds.values("routing_share", variant.name)
            about = {
                "shape": self.subject.name,
                "variant": variant.name,
                "batch": batch,
                "context": context,
                "budget": variant.budget,
                "layers": variant.layers,
                "bypass_rank": self.subject.artifact.config.bypass_rank,
                "scheduling": self.scheduling.get(variant.name if variant.budget is None else "buddy"),
            }
            rows += [rounds.row(metric, values, **about) for metric, values in figures.items()]
        return rows

    def _refused_variants(self, batch: int) -> dict[str, str]:
        if self.subject.shape is not None:
            return refusals_by_peers(self.outputs, batch, self.plan.budgets, self.subject.has_bypass)
        variants = self.subject.variants(self.plan.budgets)
        longest = max(context for size, context in self.runs if size == batch)
        return refusals_by_reference(self.outputs, batch, variants, self._reference, self.subject.vocab_size, longest)

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.subject.model, self.subject.artifact, torch.bfloat16)


def lines_of(job: EngineJob) -> Iterator[Any]:
    """Run engine_process.py for a job and yield the lines it prints, as they arrive.

    Raises:
        CalledProcessError: the process failed.
    """
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if device() == "cuda":
        env.pop("VLLM_USE_AOT_COMPILE", None)  # benchmarks/harness/engines.py switches it off for the CPU
    command = [sys.executable, "-m", ENGINE_MODULE, job.as_json()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
