"""Trains on a whole and on a shared-out base, as one of several processes; the main one writes what it saw.

    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m tests.training.two_runs CASES.json OUT.json

CASES.json: name -> settings of stage 1 with a base that is whole. A case of which `stop_after` says so is also stopped
after that many steps, on all processes at once, and goes on with a base that is shared out and with one that is whole.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vllm_buddy.training import start, token_fit
from vllm_buddy.training.dry_run import dry_run
from vllm_buddy.training.frozen_base import base_bytes, gathered_bytes
from vllm_buddy.training.loop import TrainingRun
from vllm_buddy.training.stage1 import run_stage1
from vllm_buddy.training.stage1_record import finish_run
from vllm_buddy.training.stage1_settings import Stage1Settings

LATE_SECONDS = 0.5


def trained(settings: Stage1Settings, main: bool) -> dict[str, Any]:
    """Run stage 1; `rows` are the log, which the main process alone has."""
    assert settings.model is not None
    rows: list[dict[str, Any]] = []
    artifact, run = run_stage1(settings, settings.model, rows.append, lambda _: None)
    here = base_bytes(run.model)
    if main:
        finish_run(artifact, run, settings, "vllm-buddy train", None)
    run.accelerator.wait_for_everyone()
    return {
        "losses": [row["losses"] for row in rows],
        "digest": artifact.digest,
        "base_bytes": here,
        "gathered_bytes": gathered_bytes(run.model),
        "trained": sum(p.nbytes for p in run.repair.parameters()),
    }


def stopped(settings: Stage1Settings, steps: int) -> None:
    """Run stage 1 until a step on which all processes are stopped."""
    assert settings.model is not None
    whole = TrainingRun._step

    def step(self: TrainingRun, number: int, *args: Any) -> dict[str, Any]:
        if number == steps:
            raise KeyboardInterrupt
        return whole(self, number, *args)

    TrainingRun._step = step  # type: ignore[method-assign]
    try:
        run_stage1(settings, settings.model, lambda _: None, lambda _: None)
    except KeyboardInterrupt:
        return
    finally:
        TrainingRun._step = whole  # type: ignore[method-assign]
    raise AssertionError("the run was not stopped")


def look_late() -> None:
    """Let this process be the last to look for what another one may have saved."""
    look = start._known_start

    def late(path: Path, digest: str) -> start.Start | None:
        time.sleep(LATE_SECONDS)
        return look(path, digest)

    start._known_start = late


def main(cases: Path, out: Path) -> None:
    token_fit.STEPS = 50
    accelerator = Accelerator()
    if not accelerator.is_main_process:
        look_late()
    results: dict[str, Any] = {"processes": accelerator.num_processes}
    for name, case in json.loads(cases.read_text()).items():
        steps = case.pop("stop_after", None)
        first = Stage1Settings(**case)
        folder = first.out
        split = first.model_copy(update={"shard_base": True, "out": folder / "split"})
        results[name] = {
            "whole": trained(first.model_copy(update={"out": folder / "whole"}), accelerator.is_main_process),
            "split": trained(split, accelerator.is_main_process),
        }
        if steps is not None:
            again = split.model_copy(update={"out": folder / "stopped"})
            stopped(again, steps)
            changed = first.model_copy(update={"out": folder / "changed"})
            if accelerator.is_main_process:
                shutil.copytree(again.out, changed.out)
            accelerator.wait_for_everyone()
            results[name]["resumed whole"] = trained(changed, accelerator.is_main_process)
            results[name]["resumed"] = trained(again, accelerator.is_main_process)
            assert split.model is not None
            results[name]["memory"] = dry_run(split, split.model).memory
    if accelerator.is_main_process:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
