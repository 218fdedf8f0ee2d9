"""The settings of `vllm-buddy eval-budget`."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_buddy.errors import EvaluationError
from vllm_buddy.models.find import MODEL_OR_DEFAULT_HELP
from vllm_buddy.models.torch_device import Dtype


def _files(value: Any) -> Any:
    return tuple(Path(word) for word in value.split(",")) if isinstance(value, str) else value


def _part(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        first, last = (float(word) for word in value.split(","))
    except ValueError:
        raise EvaluationError(
            f"part is {value!r}, but must be two shares with a comma between them, such as 0.8,1"
        ) from None
    if not 0 <= first < last <= 1:
        raise EvaluationError(f"part is {value!r}, but must be two ascending shares from 0 to 1")
    return first, last


class EvalBudgetSettings(BaseModel):
    """Settings of one evaluation of budget `auto`. The options of the command are generated from these fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[tuple[Path, ...], BeforeValidator(_files)] = Field(
        min_length=1,
        description="files, separated by commas, each a data set: *.txt, *.json or *.jsonl as for training",
    )
    part: Annotated[tuple[float, float], BeforeValidator(_part)] = Field(
        default=(0.8, 1.0), description="part of each file that samples come from, as shares of its length"
    )
    examples: int = Field(default=150, ge=2, description="number of samples of each file")
    artifact: str | None = Field(
        default=None, description="folder or name of the artifact (absent: the shipped artifact)"
    )
    model: Path | None = Field(default=None, description=MODEL_OR_DEFAULT_HELP)
    context: int = Field(default=64, ge=1, description="tokens of running text that the predictor decides from")
    prompt: int = Field(
        default=192, ge=1, description="largest number of prompt tokens; rows with longer prompts are left out"
    )
    answer: int = Field(default=128, ge=1, description="largest number of tokens that are scored")
    dtype: Dtype = Field(default="bfloat16", description="dtype of the model: bfloat16 or float32")
    seed: int = Field(default=0, ge=0, description="seed of the choice of samples")
    cache_dir: Path | None = Field(
        default=None, description="folder for the measured losses (absent: they are not kept)"
    )
