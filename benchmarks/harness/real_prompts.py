"""Makes prompts of real text: passages of prose, each with a task.

The passages are from this repository's documentation as it was on 2026-11-29, so that runs compare from then on.

Random tokens do not suit a peer that drafts by copying from the context, because the speed depends on how much there
is to copy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The first is answered by copying. For the second there is nothing to copy but what the answer itself repeats.
TASKS = {
    "proofread": "Correct spelling and grammar of this text. Write out the corrected text and nothing else.\n\n{text}",
    "story": "Write a short story in which somebody says: {opening}",
}
OPENING_WORDS = 10
PASSAGE_WORDS = range(45, 111)

PASSAGES_FILE = Path(__file__).with_name("passages.txt")


def passages() -> list[str]:
    """Return the passages: paragraphs of prose with a length in PASSAGE_WORDS, without markup."""
    return PASSAGES_FILE.read_text(encoding="utf-8").splitlines()


def draw_prompts(
    tokenizer: Any, task: str, texts: Sequence[str], rng: np.random.Generator, num: int
) -> list[list[int]]:
    """Return token ids of `num` prompts, each about a different text, in the tokenizer's chat format."""
    prompts = []
    for index in rng.choice(len(texts), num, replace=False):
        opening = " ".join(texts[index].split()[:OPENING_WORDS])
        message = {"role": "user", "content": TASKS[task].format(text=texts[index], opening=opening)}
        prompts.append(list(tokenizer.apply_chat_template([message], add_generation_prompt=True)["input_ids"]))
    return prompts
