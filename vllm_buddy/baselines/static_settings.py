"""The settings of `vllm-buddy orders` and `vllm-buddy prune`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_buddy.artifact.provenance import command_line
from vllm_buddy.baselines.base import MEASURED, STATIC_METHODS, check_static_method
from vllm_buddy.errors import BaselineError
from vllm_buddy.models.find import MODEL_OR_DEFAULT_HELP
from vllm_buddy.models.torch_device import DEVICE_HELP, Dtype

_HOW_TO_MEASURE = ("tokens", "window", "candidates", "device", "dtype")


def _names(value: Any) -> Any:
    return tuple(value.split(",")) if isinstance(value, str) else value


def _measured(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in MEASURED]
    if unknown:
        raise BaselineError(f"'{unknown[0]}' is not a method that is measured; known are {', '.join(MEASURED)}")
    return names


def _static(name: str) -> str:
    check_static_method(name)
    return name


class MeasuringSettings(BaseModel):
    """The settings of a measurement, except for the text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path | None = Field(default=None, description=MODEL_OR_DEFAULT_HELP)
    base_model_id: str | None = Field(default=None, description="hub id of the model (absent: the folder's name)")
    tokens: int | None = Field(
        default=None,
        ge=1,
        description="tokens to measure on, from the start of the text (absent: "
        + ", ".join(f"{name} {method.tokens}" for name, method in MEASURED.items())
        + ")",
    )
    window: int = Field(default=512, ge=2, description="tokens per window")
    candidates: int | None = Field(
        default=None,
        ge=1,
        description="layers that sleb tries in each round after the first: those that cost least when they were last "
        "tried (absent: all)",
    )
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: Dtype | None = Field(
        default=None,
        description="dtype of the model, bfloat16 or float32 (absent: "
        + ", ".join(f"{name} {str(method.dtype).removeprefix('torch.')}" for name, method in MEASURED.items())
        + ")",
    )


class OrdersSettings(MeasuringSettings):
    """The settings of `vllm-buddy orders`."""

    out: Path = Field(description="JSON file to write; other orders of the same model in it are kept")
    text: Path = Field(description="calibration text, UTF-8")
    methods: Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_measured)] = Field(
        default=tuple(MEASURED), description="methods to measure, separated by commas"
    )


class PruneSettings(MeasuringSettings):
    """The settings of `vllm-buddy prune`, which run.yaml records."""

    method: Annotated[str, AfterValidator(_static)] = Field(
        description=f"method that orders the layers: {', '.join(STATIC_METHODS)}"
    )
    out: Path = Field(description="folder for `artifact` and `checkpoint`; new or empty")
    layers: int = Field(
        description="layers that are kept, first and last included: at least 3, and fewer than the model has"
    )
    orders: Path | None = Field(
        default=None, description="layer orders from `vllm-buddy orders` (absent: the shipped ones)"
    )
    text: Path | None = Field(
        default=None, description="calibration text, UTF-8, to measure the order on (absent: the order on file)"
    )
    seed: int = Field(default=0, description="seed of the method random")

    @model_validator(mode="after")
    def _one_source_of_the_order(self) -> Self:
        given = [f"--{name}" for name in ("text", "orders") if getattr(self, name) is not None]
        if given and self.method not in MEASURED:
            raise BaselineError(
                f"the order of '{self.method}' comes from the layers' positions, so {given[0]} says nothing of it; "
                f"orders that are measured are {', '.join(MEASURED)}"
            )
        if len(given) > 1:
            raise BaselineError("the order is measured on --text or read from --orders; give one of them")
        if self.text is None and (unused := self._given(_HOW_TO_MEASURE)):
            raise BaselineError(
                f"--{unused[0]} is for an order that is measured, and none is: give --text, or leave it out"
            )
        if self.candidates is not None and not MEASURED[self.method].searches:
            raise BaselineError(
                f"--candidates are layers that a search tries, and '{self.method}' has none; leave it out"
            )
        return self

    def _given(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    def command(self) -> str:
        """Return the command line that writes the same files again."""
        return command_line("prune", self, positional=("method", "out"))
