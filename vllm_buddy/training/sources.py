"""Sources of training text, as settings name them: files, and data sets of the package `datasets`."""

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


def _home(place: Any) -> Any:
    return type(place)(os.path.expanduser(place))


# Paths of a YAML file, in which no shell has replaced `~`, and words that may be names instead.
UserPath = Annotated[Path, AfterValidator(_home)]
UserPlace = Annotated[str, AfterValidator(_home)]

Weight = Annotated[
    float,
    Field(gt=0, allow_inf_nan=False, description="share of the training sequences, relative to the other sources"),
]


class DataSource(BaseModel):
    """A file of training text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: UserPath = Field(
        description="*.txt: plain text. *.json (a list) or *.jsonl: rows with `text`, or with `instruction`, `input` "
        "and `output`, which are formatted with the model's chat template"
    )
    weight: Weight = 1.0
    share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the file that is used, from its beginning: of the tokens of plain text, else of the rows",
    )

    @property
    def name(self) -> str:
        return self.file.name


class DatasetSource(BaseModel):
    """A data set that the package `datasets` loads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: UserPlace = Field(description="name of a data set on the hub, or a folder of files that `datasets` knows")
    config: str | None = Field(default=None, description="configuration of the data set, if it has several")
    split: str = Field(default="train", description="split, such as train or validation")
    revision: str | None = Field(default=None, description="commit of a data set on the hub; without it, the newest")
    column: str | None = Field(
        default=None,
        description="column with text, or with a list of messages for the chat template (absent: rows as in files)",
    )
    streaming: bool = Field(default=False, description="read rows as they are needed instead of downloading all first")
    tokens: int | None = Field(
        default=None, ge=1, description="tokens that are read, from the beginning (absent: all; a stream needs it)"
    )
    weight: Weight = 1.0

    @model_validator(mode="after")
    def _check(self) -> "DatasetSource":
        if self.streaming and self.tokens is None:
            raise ValueError("with streaming, say how many `tokens` are read, so that a stopped run finds the same")
        return self

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.dataset, self.config, self.split) if part)


def _kind(source: Any) -> str:
    named = "dataset" in source if isinstance(source, dict) else isinstance(source, DatasetSource)
    return "dataset" if named else "file"


Source = Annotated[Annotated[DataSource, Tag("file")] | Annotated[DatasetSource, Tag("dataset")], Discriminator(_kind)]


def _named_apart(sources: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"two sources are named {twice[0]}, by which run.yaml tells them apart; rename a file, or make one of them"
        )
    return sources


# The sources of a run. Records name them by their files' names, which say nothing of folders.
Sources = Annotated[tuple[Source, ...], AfterValidator(_named_apart)]
Files = Annotated[tuple[DataSource, ...], AfterValidator(_named_apart)]
