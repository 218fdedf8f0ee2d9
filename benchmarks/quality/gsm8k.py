"""Accuracy on grade-school mathematics (GSM8K) by generation, at several budgets of one artifact.

    python -m benchmarks.quality.gsm8k gsm8k_train_alpaca.json --model qwen2.5-coder-0.5b --rows 100

Questions come from the end of the file, which the recipes leave out of training. Answers are greedy, with the chat
template, and right if the last number in them is the last number of the solution in the file. The error is the binomial
standard error. `differs` counts answers that are right at a budget and wrong at the first one, and the other way round.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.chat import greedy_answers
from benchmarks.harness.result_rows import environment, report
from vllm_buddy.artifact import identify, load_artifact, resolve_artifact
from vllm_buddy.cli.progress import note
from vllm_buddy.data_file import DataFile
from vllm_buddy.models.find import find_model
from vllm_buddy.models.folder import load_tokenizer

BUDGETS = (1.0, 0.875, 0.75, 0.5)
MOST_TOKENS = 256
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.gsm8k",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="GSM8K as rows with `instruction` and `output`")
    parser.add_argument("--model", default=None, help="folder, embedded model or hub id (default: the embedded model)")
    parser.add_argument("--artifact", default=None, help="default: the shipped one that fits the model")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--rows", type=int, default=100, help="questions (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("gsm8k.jsonl"))
    args = parser.parse_args()
    env = environment()
    folder = find_model(args.model, note)
    artifact = resolve_artifact(args.artifact, lambda: identify(folder))
    questions, solutions = last_rows(DataFile.read(args.data), args.rows)
    settings, tokenizer = {"artifact": str(artifact)}, load_tokenizer(folder)
    answers = {
        budget: [tokenizer.decode(ids, skip_special_tokens=True) for ids in found]
        for budget, found in greedy_answers(folder, settings, questions, args.budgets, MOST_TOKENS).items()
    }
    right = {budget: list(map(is_right, answers[budget], solutions)) for budget in args.budgets}
    rows = []
    for budget, marks in right.items():
        share = sum(marks) / len(marks)
        rows.append(
            {
                "metric": "gsm8k_accuracy",
                "model": identify(folder).id,
                "artifact": load_artifact(artifact).digest,
                "budget": budget,
                "accuracy": round(share, 4),
                "error": round(math.sqrt(share * (1 - share) / len(marks)), 4),
                "rows": len(marks),
                "differs": [
                    sum(a > b for a, b in zip(marks, right[args.budgets[0]])),
                    sum(a < b for a, b in zip(marks, right[args.budgets[0]])),
                ],
            }
        )
    report(args.out, rows, env, show)


def last_rows(file: DataFile, count: int) -> tuple[list[str], list[str]]:
    """Return questions and solutions of the last `count` rows."""
    rows = (file.rows or [])[-count:]
    return [row["instruction"] for row in rows], [row["output"] for row in rows]


def is_right(answer: str, solution: str) -> bool:
    """Whether both end with the same number."""
    return number(answer) is not None and number(answer) == number(solution)


def number(text: str) -> float | None:
    """Return the last number of a text; None if there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line per budget."""
    for row in rows:
        gained, lost = row["differs"]
        print(
            f"budget {row['budget']:g}: {row['accuracy']:.1%} ± {row['error']:.1%} of {row['rows']} right "
            f"({gained} gained, {lost} lost)"
        )


if __name__ == "__main__":
    main()
