"""The settings of `vllm-buddy depth-profile`."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from vllm_buddy.errors import EvaluationError
from vllm_buddy.models.find import MODEL_OR_DEFAULT_HELP
from vllm_buddy.models.torch_device import DEVICE_HELP, Dtype


class DepthProfileSettings(BaseModel):
    """The settings of one profile, from which the command's options are generated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Path = Field(description="UTF-8 text, whose passages the model goes on from")
    model: Path | None = Field(default=None, description=MODEL_OR_DEFAULT_HELP)
    artifact: str | None = Field(
        default=None,
        description="artifact whose paths draft, with its bypass and its draft exits (absent: the "
        "shipped one of the model)",
    )
    text_skip: int = Field(default=0, ge=0, description="tokens that are skipped at the start of the text")
    passages: int = Field(default=24, ge=1, description="passages of the text to go on from")
    passage_tokens: int = Field(default=48, ge=2, description="tokens of each passage")
    tokens: int = Field(default=128, ge=2, description="tokens that the model writes after each, greedily")
    depths: tuple[int, ...] = Field(default=(), description="depths to draft at (absent: eight of the artifact's)")
    drafts: int = Field(default=4, ge=1, description="longest chain of drafts")
    ngram_max: int = Field(default=4, ge=1, description="longest n-gram that is looked up")
    ngram_min: int = Field(default=2, ge=1, description="shortest n-gram that is looked up")
    batches: tuple[PositiveInt, ...] = Field(default=(1, 4, 16), description="batch sizes to predict speed-up for")
    row_cost: float = Field(
        default=0.02, ge=0, description="time of one more row in a step, as a share of a step of one row"
    )
    devices: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        default=(2, 4, 8), description="pipeline stages of DEX to simulate, 2 or more"
    )
    shape_of: Path | None = Field(
        default=None,
        description="folder or config.json of another model, by whose sizes passes are priced at equal shares of its "
        "layers: a prediction from this model's drafts",
    )
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: Dtype = Field(default="float32", description="dtype of the model: bfloat16 or float32")

    @field_validator("depths", "batches", "devices", mode="before")
    @classmethod
    def _of_commas(cls, value: Any) -> Any:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _leaves_room_for_drafts(self) -> Self:
        if self.tokens <= self.drafts:
            raise EvaluationError(
                f"a chain of {self.drafts} drafts leaves nothing to count of {self.tokens} tokens; raise --tokens or "
                "lower --drafts"
            )
        return self
