"""Training text from data sets of the package `datasets`, in local folders."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import run
from tests.training.test_drawn_text import TEMPLATE
from vllm_buddy.errors import DataError
from vllm_buddy.models.folder import load_tokenizer
from vllm_buddy.training import hub_rows
from vllm_buddy.training.corpus import ROWS_AT_ONCE, Corpus
from vllm_buddy.training.sources import DataSource
from vllm_buddy.training.stage1_record import finish_run
from vllm_buddy.training.stage1_settings import Stage1Settings
from vllm_buddy.training.stage2_settings import Stage2Settings

datasets = pytest.importorskip("datasets")

ROWS = [f"Row {i} holds {i * i} words of some kind." for i in range(2 * ROWS_AT_ONCE)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=["jsonl", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data set with the columns `text`, `body` (the same) and `messages`."""
    rows = [{"text": t, "body": t, "messages": [{"role": "user", "content": t}], "number": 1} for t in ROWS]
    folder = tmp_path / "set"
    folder.mkdir()
    if request.param == "jsonl":
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_is_read_as_a_file_is(
    settings: dict[str, Any], folder: Path, tmp_path: Path, streaming: bool
) -> None:
    """Fails if a data set gives other tokens than the same rows in a file, or more than asked."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ROWS))
    tokenizer = load_tokenizer(settings["model"])
    data: list[dict[str, Any]] = [{"dataset": "set", "streaming": streaming, "tokens": 2000, "column": "body"}]
    (source,) = Stage1Settings(**settings | {"data": data}).data
    found = Corpus.read([source], tmp_path, tokenizer, 32, 60, 0)
    (whole,) = Stage1Settings(**settings | {"data": [{"file": "rows.jsonl"}]}).data
    wanted = Corpus.read([whole], tmp_path, tokenizer, 32, 60, 0)
    assert len(found.sequences) == 2000 // 32
    first = {sequence.tobytes() for sequence in wanted.sequences}
    assert all(sequence.tobytes() in first for sequence in found.sequences)
    assert list(found.sha256) == ["set train"]


def test_a_stream_is_not_read_to_its_end(
    settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if all of a data set is downloaded where a part of it is asked for."""
    taken = []
    rows = hub_rows._rows
    monkeypatch.setattr(hub_rows, "_rows", lambda *args: (taken.append(row) or row for row in rows(*args)))
    run(settings | {"data": [{"dataset": str(folder), "streaming": True, "tokens": 3000}]})
    assert len(taken) == ROWS_AT_ONCE


def test_a_stopped_run_on_a_stream_goes_on(settings: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Fails if a resumed run reads other rows, or its record does not say which data set it was."""
    streamed = settings | {"data": [{"dataset": str(folder), "streaming": True, "tokens": 3000, "weight": 2}]}
    artifact, stage, losses = run(streamed | {"out": tmp_path / "whole", "name": "run"})
    with pytest.raises(KeyboardInterrupt):
        run(streamed, 3)
    resumed, _, rest = run(streamed)
    assert rest == losses[2:]
    assert resumed.digest == artifact.digest
    finish_run(artifact, stage, Stage1Settings(**streamed), "vllm-buddy train", None)
    record = (streamed["out"] / "run.yaml").read_text()
    for line in (f'dataset: "{folder}"', 'split: "train"', "tokens: 3000", "streaming: true", "sha256: "):
        assert line in record


def test_messages_go_through_the_chat_template(settings: dict[str, Any], folder: Path) -> None:
    """Fails if a column of messages is refused, or its text is not in the model's template."""
    tokenizer = load_tokenizer(settings["model"])
    tokenizer.chat_template = TEMPLATE
    (source,) = Stage1Settings(**settings | {"data": [{"dataset": str(folder), "column": "messages"}]}).data
    assert next(hub_rows.documents(source, None, tokenizer)) == f"<user>{ROWS[0]}<end>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"streaming": True}, "say how many `tokens` are read"),
        ({"split": "test"}, "cannot load the data set .* test: Unknown split"),
        ({"column": "words"}, "row 0: `words` is no text, .*columns are text, body, messages, number"),
        ({"column": "number"}, "row 0: `number` is no text"),
        ({"column": "messages"}, "there is no chat template"),
        ({"dataset": "nobody/nothing"}, "cannot load the data set nobody/nothing train"),
        ({"tokens": 5}, "gives 5 tokens, less than one sequence"),
        ({"share": 0.5}, "Extra inputs"),
        ({"file": "a.txt"}, "Extra inputs"),
    ],
)
def test_what_cannot_be_read_is_one_line(
    settings: dict[str, Any], folder: Path, change: dict[str, Any], message: str
) -> None:
    """Fails if a wrong name ends in an error of `datasets`, or does not say what is there."""
    with pytest.raises(ValueError, match=message):
        run(settings | {"data": [{"dataset": str(folder)} | change]})


def test_without_the_package(settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing package ends in a traceback."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install datasets"):
        run(settings | {"data": [{"dataset": str(folder)}]})


def test_a_source_is_a_file_or_a_data_set(settings: dict[str, Any]) -> None:
    """Fails if stage 2, which reads files, accepts a data set, or a mistake in a file is explained as one in both."""
    assert isinstance(Stage1Settings(**settings).data[0], DataSource)
    with pytest.raises(ValueError, match=r"data\.0\.file\.weight") as caught:
        Stage1Settings(**settings | {"data": [{"file": "a.txt", "weight": 0}]})
    assert "dataset" not in str(caught.value)
    with pytest.raises(ValueError, match="Extra inputs"):
        Stage2Settings(artifact="a", out="b", data=[{"dataset": "c"}])
