"""Makes prompts of real text: passages of this repository's documentation, each with a task.

Random tokens do not suit a peer that drafts by copying from the context, because the speed depends on how much there
is to copy.
"""

import re
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

_ROOT = Path(__file__).parents[2]
_FENCED = re.compile(r"```.*?```|<!--.*?-->", re.DOTALL)
_PARAGRAPH_END = re.compile(r"\n\s*\n|\n(?=- |\d\. )")
_NOT_PROSE = re.compile(r"^\s*[#<]|^ {4}|\|")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
_MARKUP = re.compile(r"[*`]|^(- |\d\. )")


def passages() -> list[str]:
    """Return the prose paragraphs of README.md and docs/*.md with a length in PASSAGE_WORDS, without markup."""
    found = []
    for path in [_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))]:
        for block in _PARAGRAPH_END.split(_FENCED.sub("\n\n", path.read_text())):
            if not _NOT_PROSE.search(block):
                text = " ".join(_MARKUP.sub("", _LINK.sub(r"\1", block.strip())).split())
                found += [text] if len(text.split()) in PASSAGE_WORDS else []
    return found


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
