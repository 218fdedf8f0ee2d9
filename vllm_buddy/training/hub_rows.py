"""Rows of a data set that the package `datasets` loads, from the hub or from a folder, streamed or whole."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_buddy.data_file import exchange, plain_text
from vllm_buddy.errors import DataError, cut
from vllm_buddy.training.sources import DatasetSource


def documents(source: DatasetSource, folder: Path | None, tokenizer: Any) -> Iterator[str]:
    """Yield the text of each row, in order, in the model's chat template where it is a conversation.

    Rows have the fields of a data file, or `source.column` names text or a list of messages. folder: where a relative
    path is looked for before the hub.

    Raises:
        DataError: `datasets` is not installed, cannot load the data, or a row has another form.
    """
    for number, row in enumerate(_rows(source, folder)):
        where = f"{source.name}: row {number}"
        if source.column is None:
            text = plain_text(row, where)
            yield exchange(row, tokenizer).whole if text is None else text
            continue
        value = row.get(source.column)
        if isinstance(value, list) and tokenizer.chat_template:
            value = _conversation(value, tokenizer, where)
        if not isinstance(value, str):
            found = "neither text nor messages" if tokenizer.chat_template else "no text, and there is no chat template"
            raise DataError(f"{where}: `{source.column}` is {found}; columns are {', '.join(row)}")
        yield value


def _conversation(messages: list[Any], tokenizer: Any, where: str) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates raise errors of their own
        raise DataError(f"{where}: the messages do not fit the chat template ({cut(str(error))})") from None


def _rows(source: DatasetSource, folder: Path | None) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError("a data set needs the package datasets: pip install datasets") from None
    local = Path(source.dataset) if folder is None else folder / source.dataset
    try:
        yield from load_dataset(
            str(local) if local.is_dir() else source.dataset,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=source.streaming,
        )
    except Exception as error:  # every format and the hub have errors of their own
        raise DataError(f"cannot load the data set {source.name}: {cut(str(error))}") from None
