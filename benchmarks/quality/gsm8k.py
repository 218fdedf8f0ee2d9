"""Accuracy on grade-school mathematics (GSM8K) by generation, at several budgets of one artifact.

    python -m benchmarks.quality.gsm8k gsm8k_train_alpaca.json --model qwen2.5-coder-0.5b --rows 100

Questions come from the end of the file, which the recipes leave out of training. Answers are greedy, with the chat
template, and right if the last number in them is the last number of the solution in the file. The error is the binomial
standard error. `differs` counts answers that are right at a budget and wrong at 1.0, and the other way round.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import engines
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
    answers = ask(folder, artifact, questions, args.budgets)
    right = {budget: [number(a) == number(s) for a, s in zip(answers[budget], solutions)] for budget in args.budgets}
    rows = []
    for budget, marks in right.items():
        share = sum(marks) / len(marks)
        rows.append(
            {
                "metric": "gsm8k_accuracy",
                "model": folder.name,
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


def ask(model: Path, artifact: Path, questions: Sequence[str], budgets: Sequence[float]) -> dict[float, list[str]]:
    """Return the answers at each budget."""
    from vllm import SamplingParams

    tokenizer = load_tokenizer(model)
    config = {"buddy": {"artifact": str(artifact)}}
    llm = engines.start_engine(str(model), model_impl="buddy", additional_config=config, enforce_eager=True, seed=0)
    stops = llm.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    prompts, sampling = [], []
    for budget in budgets:
        for question in questions:
            message = [{"role": "user", "content": question}]
            ids = tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"]
            prompts.append({"prompt_token_ids": list(ids)})
            options: dict[str, Any] = {"temperature": 0, "max_tokens": MOST_TOKENS, "detokenize": False}
            sampling.append(SamplingParams(**options, stop_token_ids=stops, extra_args={"buddy_budget": budget}))
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    texts = [tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True) for output in outputs]
    return {b: texts[i * len(questions) : (i + 1) * len(questions)] for i, b in enumerate(budgets)}


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
