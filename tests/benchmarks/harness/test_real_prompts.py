"""Tests the prompts that are made of passages."""

import numpy as np

from benchmarks.harness.real_prompts import PASSAGE_WORDS, TASKS, draw_prompts, passages

LARGEST_BATCH = 8


class Letters:
    """Stands in for a tokenizer with a chat format."""

    def apply_chat_template(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> dict[str, list[int]]:
        assert add_generation_prompt
        return {"input_ids": [ord(c) for c in messages[0]["content"]]}


def test_passages_are_prose() -> None:
    """Fails if passages contain tables, code or headings, whose continuation would mean nothing."""
    for text in passages():
        assert len(text.split()) in PASSAGE_WORDS
        assert not text.startswith(("#", "|", "- ", "    "))
        assert not {"|", "`", "\n", "](", "<!--"} & {text[i : i + n] for i in range(len(text)) for n in (1, 2, 4)}


def test_there_are_enough_passages_for_a_batch() -> None:
    """Fails if a batch would repeat prompts."""
    texts = passages()
    assert len(set(texts)) == len(texts) >= 2 * LARGEST_BATCH


def test_prompts_of_a_batch_differ_and_can_be_drawn_again() -> None:
    """Fails if requests share a prompt, or a round cannot be repeated."""
    texts = passages()
    first = draw_prompts(Letters(), "proofread", texts, np.random.default_rng(3), LARGEST_BATCH)
    again = draw_prompts(Letters(), "proofread", texts, np.random.default_rng(3), LARGEST_BATCH)
    assert first == again
    assert len({tuple(prompt) for prompt in first}) == LARGEST_BATCH


def test_only_one_task_brings_the_text_to_copy() -> None:
    """Fails if the copying task has nothing to copy, or the other task has much to copy."""
    texts = passages()[:1]
    prompts = {task: draw_prompts(Letters(), task, texts, np.random.default_rng(0), 1)[0] for task in TASKS}
    assert texts[0] in "".join(map(chr, prompts["proofread"]))
    assert len(prompts["story"]) < len(prompts["proofread"]) / 2
    assert texts[0][:20] in "".join(map(chr, prompts["story"]))
