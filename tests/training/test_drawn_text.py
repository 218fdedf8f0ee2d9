"""Text drawn from the model itself: how much of it, and in which form."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.importance.conftest import model_with_tokenizer
from vllm_buddy.data_file import DataFile
from vllm_buddy.errors import DataError
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.training.drawn_text import Answerer, Draw, Drawn, Sampler

__all__ = ["model_with_tokenizer"]

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer(model_with_tokenizer: Path) -> Any:
    return load_tokenizer(model_with_tokenizer)


class Model:
    """Continues with as many of `text`'s tokens as it may, one for each character."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.draws: list[Draw] = []

    def __call__(self, draws: Sequence[Draw]) -> list[Drawn]:
        self.draws += draws
        texts = [self.text[: draw.max_tokens] for draw in draws]
        return [Drawn(text, len(text)) for text in texts]


@pytest.mark.parametrize("text", ["x" * 1000, "x" * 30, "x"])
@pytest.mark.parametrize("chat", [False, True])
def test_about_as_many_tokens_as_asked(tokenizer: Any, text: str, chat: bool) -> None:
    """Fails if a whole batch of samples is drawn where a few are asked for: 57,000 tokens instead of 6,000."""
    tokenizer.chat_template = TEMPLATE if chat else None
    model = Model(text)
    *_, (_, done) = Sampler(tokenizer, 224).rounds(6000, 256, model)
    assert 6000 <= done < 6000 + 224
    assert sum(min(draw.max_tokens, len(text)) for draw in model.draws) == done
    assert len({draw.seed for draw in model.draws}) == len(model.draws) // (2 if chat else 1)


def test_a_chat_model_asks_and_answers(tokenizer: Any) -> None:
    """Fails if an instruct model continues plain text, or answers are not to its own questions."""
    tokenizer.chat_template = TEMPLATE
    model = Model("abcdefgh" * 10)
    rows, done = next(Sampler(tokenizer, 16, openers=["How", "Why"]).rounds(32, 2, model))
    assert rows == [{"instruction": f"{opener}abcd", "output": "abcdefghabcd"} for opener in ("How", "Why")]
    assert done == 32
    prompts = [tokenizer.decode(draw.prompt) for draw in model.draws]
    assert prompts == ["<user>How", "<user>Why", "<user>Howabcd<end><assistant>", "<user>Whyabcd<end><assistant>"]


def test_plain_text_where_it_is_asked_for(tokenizer: Any) -> None:
    """Fails if --plain draws exchanges, or a tokenizer without a template is asked for one."""
    for template, plain in ((TEMPLATE, True), (None, False)):
        tokenizer.chat_template = template
        rows, _ = next(Sampler(tokenizer, 8, plain=plain, openers=["The"]).rounds(8, 1, Model(" end")))
        assert rows == [{"text": "The end"}]


def test_no_prompt_is_longer_than_the_engine_takes(tokenizer: Any) -> None:
    """Fails if a question whose text takes more tokens than it was drawn with ends the engine."""
    tokenizer.chat_template = TEMPLATE
    sampler = Sampler(tokenizer, 8, openers=["How"])

    def generate(draws: Sequence[Draw]) -> list[Drawn]:
        assert all(len(draw.prompt) + draw.max_tokens <= sampler.length for draw in draws)
        return [Drawn("\ufffd" * 9, 2) for _ in draws]

    rows, done = next(sampler.rounds(8, 1, generate))
    assert (rows, done) == ([], 2)


def asked(rows: list[Any]) -> DataFile:
    return DataFile(Path("asked.json"), "", rows=rows)


@pytest.mark.parametrize("chat", [False, True])
def test_questions_of_a_file_are_answered_once(tokenizer: Any, chat: bool) -> None:
    """Fails if a question is asked twice or not at all, one that is held out is asked, or the input is lost."""
    tokenizer.chat_template = TEMPLATE if chat else None
    rows: list[Any] = [{"instruction": f"Q{i}", "input": f"in{i}", "output": "of the file"} for i in range(10)]
    model = Model(" of the model")
    drawn = list(Answerer(asked([{"text": "no question"}, *rows]), 9 / 11, tokenizer, 4).rounds(1000, 3, model))
    answers = [row for found, _ in drawn for row in found]
    assert sorted(answers, key=str) == [{"instruction": f"Q{i}", "input": f"in{i}", "output": "of"} for i in range(8)]
    assert drawn[-1][1] == 8 * 4
    prompt = "<user>Q7\n\nin7<end><assistant>" if chat else "Q7\n\nin7\n\n"
    assert prompt in {tokenizer.decode(draw.prompt) for draw in model.draws}


def test_no_more_answers_than_asked(tokenizer: Any) -> None:
    """Fails if all questions are answered where a few tokens are wanted, or the seed does not choose which."""
    questions = asked([{"instruction": f"Q{i}"} for i in range(100)])
    chosen = []
    for seed in (0, 0, 1):
        *_, (_, done) = Answerer(questions, 1.0, tokenizer, 4, seed).rounds(40, 3, model := Model("abcd"))
        assert 40 <= done < 44
        chosen.append([draw.prompt for draw in model.draws])
    assert chosen[0] == chosen[1] != chosen[2]


def test_a_question_without_input_is_one(tokenizer: Any) -> None:
    """Fails if rows whose `input` is null or empty, as data sets have them, are left out without a word."""
    questions = asked([{"instruction": "A", "input": None}, {"instruction": "B", "input": ""}, {"instruction": "C"}])
    rows = [row for found, _ in Answerer(questions, 1.0, tokenizer, 4).rounds(100, 9, Model("x")) for row in found]
    assert sorted(rows, key=str) == [{"instruction": name, "output": "x"} for name in "ABC"]


def test_a_file_without_questions_is_refused(tokenizer: Any) -> None:
    """Fails if text, or a share without rows, ends in a traceback or an empty file."""
    for file, share in ((asked([{"text": "x"}]), 1.0), (asked([{"instruction": "x"}]), 0.5)):
        with pytest.raises(DataError, match="no row with `instruction`"):
            Answerer(file, share, tokenizer, 4)
