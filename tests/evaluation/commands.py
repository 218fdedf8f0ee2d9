"""The command `vllm-buddy eval` in this process, and the rows that it writes."""

import json
from pathlib import Path
from typing import Any

from vllm_buddy.cli.main import main


def run_eval(data: list[str], out: Path, *options: str) -> list[dict[str, Any]]:
    assert main(["eval", *data, "--json", str(out), *options]) == 0
    return json.loads(out.read_text())


def by_metric(rows: list[dict[str, Any]], policy: str) -> dict[tuple[float, str], tuple[float, float, int]]:
    return {
        (row["budget"], row["metric"]): (row["value"], row["stderr"], row["n"])
        for row in rows
        if row["policy"] == policy
    }
