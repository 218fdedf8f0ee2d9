"""Lets one model answer the same questions at several budgets, and writes the answers side by side.

    python -m benchmarks.quality.answers docs/answers.md                        # about 2 minutes on 2 cores
    python -m benchmarks.quality.answers docs/answers.md --before OLD_ARTIFACT  # beside another artifact's answers

The answers of OLD_ARTIFACT are named after its folder.

Answers are greedy. A number says how much an answer repeats itself: the share of its runs of four tokens that occurred
in it before. It is 0 for most good answers and near 1 for an answer that is caught in a loop.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.chat import greedy_answers
from vllm_buddy.artifact import SHIPPED_DIR
from vllm_buddy.models.embedded import DEFAULT_MODEL, fetch
from vllm_buddy.models.folder import load_tokenizer

BUDGETS = (1.0, 0.875, 0.75, 0.5)
MOST_TOKENS = 80
QUESTIONS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "What is 17 plus 25? Explain the steps.",
    "Give me three tips for learning a new language.",
    "Who wrote Romeo and Juliet?",
    "Summarise the water cycle.",
    "Write a polite e-mail to ask for a day off.",
    "What are the primary colours?",
    "Explain what a computer program is to a child.",
    "List five healthy snacks.",
    "What is the difference between a virus and a bacterium?",
    "Tell me a story about a lost dog.",
    "Why do leaves change colour in autumn?",
    "Write a Python function that adds two numbers.",
    "What should I pack for a day at the beach?",
    "Describe how a bicycle works.",
    "What happened in 1969 on the Moon?",
    "Give a synonym and an antonym of the word happy.",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="Markdown file to write")
    parser.add_argument("--artifact", type=Path, default=SHIPPED_DIR / f"{DEFAULT_MODEL}-token")
    parser.add_argument("--before", type=Path, help="another artifact, served with one depth per request")
    args = parser.parse_args()
    by_token = {"schedule": {"prefill": "token", "decode": "token"}}
    asked: dict[str, tuple[Path, dict[str, Any]]] = {"depths per token": (args.artifact, by_token)}
    asked["one depth"] = (args.artifact, {})
    if args.before is not None:
        asked[args.before.name] = (args.before, {})
    answers = {
        name: greedy_answers(fetch(), {"artifact": str(folder), **settings}, QUESTIONS, BUDGETS, MOST_TOKENS)
        for name, (folder, settings) in asked.items()
    }
    args.out.write_text(page(answers, args.artifact.name))
    print(f"written to {args.out}")


def repeated(token_ids: Sequence[int], n: int = 4) -> float:
    """Return the share of runs of `n` tokens that occurred before."""
    runs = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def page(answers: Mapping[str, Mapping[float, Sequence[Sequence[int]]]], artifact: str) -> str:
    """Return the page: a table of repetition, then the answers to each question.

    artifact: name of the one behind the first two of `answers`; others are named after theirs.
    """
    tokenizer = load_tokenizer(fetch())
    names = list(answers)
    lines = [
        "# Answers side by side",
        "",
        f"SmolLM2-135M-Instruct answers {len(QUESTIONS)} questions greedily, in at most {MOST_TOKENS} tokens.",
        f"{' and '.join(f'*{name}*' for name in names[:2])} are two ways to serve the artifact `{artifact}`.",
        *(f"*{name}* is another artifact, with one depth per request." for name in names[2:]),
        "`python -m benchmarks.quality.answers docs/answers.md --before ARTIFACT` writes this page.",
        "",
        "Share of runs of four tokens that repeat an earlier one of the same answer, mean over the questions, and the",
        "number of answers in which it is above a half:",
        "",
        "| budget | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for budget in BUDGETS:
        cells = []
        for name in names:
            shares = [repeated(ids) for ids in answers[name][budget]]
            cells.append(f"{np.mean(shares):.1%}, {sum(share > 0.5 for share in shares)}")
        lines.append(f"| {budget} | " + " | ".join(cells) + " |")
    for number, question in enumerate(QUESTIONS):
        lines += ["", f"## {question}", ""]
        full = tokenizer.decode(answers[names[0]][1.0][number], skip_special_tokens=True)
        lines += ["**1.0**: " + _one_line(full)]
        for budget in BUDGETS[1:]:
            for name in names:
                text = tokenizer.decode(answers[name][budget][number], skip_special_tokens=True)
                lines += ["", f"**{budget}, {name}**: " + _one_line(text)]
    return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    """Return the text in one line that Markdown shows as it is."""
    escaped = "".join("\\" + char if char in "\\`*_{}[]<>#|$" else char for char in text)
    return " ".join(escaped.split())


if __name__ == "__main__":
    main()
