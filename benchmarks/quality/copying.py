"""Measures how faithfully a model copies at several budgets: it is asked to proofread passages.

    python -m benchmarks.quality.copying                                             # 1 minute on 2 cores
    python -m benchmarks.quality.copying --artifacts FIRST SECOND THIRD smollm2-135m # folders, or names of shipped ones

Prompts are routed as answers are, or run all layers (`"prompt": "full"`). No training has seen the passages. Answers
are greedy. *Copied* is the share of an answer's runs of four tokens that stand in the prompt, *repeated* the share that
occurred in the answer before. The full model corrects little, so what it copies is close to what can be.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.chat import greedy_answers
from benchmarks.harness.real_prompts import TASKS, passages
from benchmarks.harness.result_rows import RESULTS_DIR, environment, report
from benchmarks.harness.rounds import positive_int
from benchmarks.quality.answers import BUDGETS, repeated
from vllm_buddy.artifact import SHIPPED_DIR, load_artifact
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.serving.admission.option_names import FULL_PROMPT, ROUTED_PROMPT

MOST_TOKENS = 96
RUN = 4  # tokens
PROMPTS = (ROUTED_PROMPT, FULL_PROMPT)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.copying",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--artifacts", nargs="+", default=[DEFAULT_MODEL], help="default: the shipped one")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, choices=PROMPTS)
    parser.add_argument("--passages", type=positive_int, default=48)
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "quality_copying.jsonl")
    args = parser.parse_args()
    env = environment()
    report(args.out, measure(args.artifacts, args.prompts, args.passages), env, show)


def measure(artifacts: Sequence[str], prompts_run: Sequence[str], num_passages: int) -> list[dict[str, Any]]:
    """Let the embedded model answer with each artifact; returns a row per artifact, kind of prompt and budget.

    artifacts: names of shipped ones, or folders. prompts_run: values of the setting `prompt`.
    """
    model = fetch()
    tokenizer = load_tokenizer(model)
    texts = passages()
    chosen = np.random.default_rng(0).choice(len(texts), num_passages, replace=False)
    questions = [TASKS["proofread"].format(text=texts[index]) for index in chosen]
    prompts = [list(tokenizer(question)["input_ids"]) for question in questions]
    rows = []
    for name, run in product(artifacts, prompts_run):
        folder = path if (path := SHIPPED_DIR / name).is_dir() else Path(name)
        answers = greedy_answers(model, {"artifact": str(folder), "prompt": run}, questions, BUDGETS, MOST_TOKENS)
        about = {"artifact": Path(name).name, "digest": load_artifact(folder).digest, "passages": num_passages}
        about["prompts"] = run
        for budget, found in answers.items():
            shares = np.array([[copied(ids, prompt), repeated(ids, RUN)] for ids, prompt in zip(found, prompts)])
            (copied_, repeated_), error = shares.mean(axis=0), shares[:, 0].std(ddof=1) / num_passages**0.5
            rows.append(
                {**about, "budget": budget, "copied": round(float(copied_), 4), "stderr": round(float(error), 4)}
                | {"repeated": round(float(repeated_), 4)}
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line per artifact, kind of prompt and budget."""
    for row in rows:
        print(
            f"{row['artifact']:24} {row['prompts']:6} {row['budget']:5g}  "
            f"copied {row['copied']:.3f} ± {row['stderr']:.3f}  repeated {row['repeated']:.3f}"
        )


def copied(token_ids: Sequence[int], prompt: Sequence[int]) -> float:
    """Return the share of an answer's runs of RUN tokens that stand in the prompt."""
    runs, there = (
        [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)] for ids in (list(token_ids), list(prompt))
    )
    known = set(there)
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


if __name__ == "__main__":
    main()
