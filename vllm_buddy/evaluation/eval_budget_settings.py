"""Everything that decides what `vllm-buddy eval-budget` measures."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vllm_buddy.errors import EvaluationError


def _files(value: Any) -> Any:
    return tuple(Path(word) for word in value.split(",")) if isinstance(value, str) else value


def _part(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        first, last = (float(word) for word in value.split(","))
    except ValueError:
        raise EvaluationError(f"part is {value!r}; wanted are two shares with a comma between, as 0.8,1") from None
    if not 0 <= first < last <= 1:
        raise EvaluationError(f"part is {value!r}; wanted are two ascending shares from 0 to 1")
    return first, last


class EvalBudgetSettings(BaseModel):
    """Settings of one evaluation; the options of `vllm-buddy eval-budget` are made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: Annotated[tuple[Path, ...], BeforeValidator(_files)] = Field(
        min_length=1, description="files with commas between, a data set each: *.txt, *.json or *.jsonl as for training"
    )
    part: Annotated[tuple[float, float], BeforeValidator(_part)] = Field(
        default=(0.8, 1.0), description="where in each file the samples come from, as shares of it"
    )
    examples: int = Field(default=150, ge=2, description="samples of each file")
    artifact: str | None = Field(default=None, description="folder or name of the artifact (absent: the shipped one)")
    model: Path | None = Field(default=None, description="model folder (absent: the embedded model)")
    context: int = Field(default=64, ge=1, description="tokens that decide, of running text")
    prompt: int = Field(default=192, ge=1, description="tokens of the longest prompt; rows with more are left out")
    answer: int = Field(default=128, ge=1, description="tokens that are scored, at most")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="bfloat16 or float32")
    seed: int = Field(default=0, ge=0, description="of the draw of samples")
    cache_dir: Path | None = Field(default=None, description="where measured losses are kept (absent: nowhere)")
