"""Writes questions whose answer is a copy of a passage, for training text: rows with an `instruction` each.

    python -m tools.copy_questions DATA/gpteacher_roleplay.json OUT.json
    vllm-buddy sample DATA/copied.jsonl --questions OUT.json --temperature 0.3 --tokens 60000

Users of small models have them correct, quote and edit text. Text that is drawn from a model holds little of this, and
a path that was not trained on it copies less faithfully than the whole model.
"""

import argparse
import json
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

from vllm_buddy.data_file import DataFile

ASKED = (
    "Repeat the following text word for word.",
    "Proofread the text below and give me the final version.",
    "Copy this paragraph:",
    "Fix the typos in this paragraph, if there are any. Change nothing else.",
    "Quote this passage in full.",
    "Rewrite this text, changing as little as possible.",
    "Here is a note. Return it as it is.",
)
WORDS = range(25, 90)  # of a passage


def main() -> None:
    """Write a question for each paragraph of the answers in a file of instructions."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.copy_questions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("instructions", type=Path, help="rows with an `output`, *.json or *.jsonl")
    parser.add_argument("out", type=Path, help="*.json to write")
    args = parser.parse_args()
    rows = DataFile.read(args.instructions).rows
    if rows is None or not all(isinstance(row, dict) and isinstance(row.get("output"), str) for row in rows):
        parser.error(f"{args.instructions} must hold rows with an `output`, which is text")
    args.out.write_text(json.dumps(questions(row["output"] for row in rows), indent=1), encoding="utf-8")


def questions(texts: Iterable[str]) -> list[dict[str, str]]:
    """Rows for the paragraphs of some texts that have a length in WORDS, in order; each way of asking in turn."""
    paragraphs = (" ".join(part.split()) for text in texts for part in text.split("\n"))
    passages = dict.fromkeys(passage for passage in paragraphs if len(passage.split()) in WORDS)
    return [{"instruction": f"{asked}\n\n{passage}"} for passage, asked in zip(passages, cycle(ASKED))]


if __name__ == "__main__":
    main()
