"""Everything that decides what `vllm-buddy eval` measures."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_buddy.errors import BudgetError, EvaluationError
from vllm_buddy.evaluation.policy import PolicySpec
from vllm_buddy.evaluation.windows import check_window
from vllm_buddy.method import parse_budget


def _budgets(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return tuple(parse_budget(float(word)) for word in value.split(","))
    except BudgetError as error:
        raise EvaluationError(str(error)) from None
    except ValueError:
        raise EvaluationError(f"budgets are {value!r}; wanted are numbers in (0, 1] with commas between") from None


def _policies(value: Any) -> Any:
    return tuple(PolicySpec.parse(word) for word in value.split(",")) if isinstance(value, str) else value


class EvalSettings(BaseModel):
    """Settings of one evaluation; the options of `vllm-buddy eval` are made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Path | None = Field(default=None, description="text for perplexity, KL and agreement, UTF-8")
    piqa: Path | None = Field(
        default=None, description="multiple-choice questions, JSONL with goal, sol1, sol2 and label (0 or 1)"
    )
    budgets: Annotated[tuple[float, ...], BeforeValidator(_budgets)] = Field(
        default=(1.0, 0.875, 0.75, 0.5), description="budgets, with commas between"
    )
    policy: Annotated[tuple[PolicySpec, ...], BeforeValidator(_policies)] = Field(
        default=tuple(map(PolicySpec.parse, ("buddy", "shortgpt", "sleb"))),
        description="policies, with commas between: buddy, a static method, NAME=DIR for another artifact; "
        "buddy:frozen and buddy:prompt_only take routing away. The unrouted model is always measured",
    )
    model: Path | None = Field(default=None, description="model folder (absent: the embedded model)")
    artifact: str | None = Field(
        default=None, description="folder or name of the artifact of policy buddy (absent: the shipped one that fits)"
    )
    engine: Literal["hf", "vllm"] = Field(
        default="hf", description="hf: Hugging Face with this package's routed forward; vllm: the plugin in vLLM, no KL"
    )
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="bfloat16 or float32")
    kv_policy: Literal["masked", "kv_only", "zero"] = Field(default="masked", description="masked, kv_only or zero")
    paths: Literal["free", "library"] | None = Field(
        default=None,
        description="free, or library: artifacts pick among their fixed lists of paths (absent: as in serving)",
    )
    route_every: int | None = Field(
        default=None,
        ge=0,
        description="scored tokens between two decisions; 1: each; 0: the context's path (absent: as in serving)",
    )
    window: int = Field(default=512, description="tokens of text per window")
    context: int = Field(default=64, description="tokens of a window that decide the first path and are not scored")
    stride: int | None = Field(
        default=None, description="tokens between the starts of windows (absent: window - context, each scored once)"
    )
    text_skip: int = Field(default=0, ge=0, description="tokens left out at the start of the text")
    text_tokens: int = Field(default=65536, ge=0, description="tokens of text used; 0 for all")
    piqa_rows: int = Field(default=0, ge=0, description="questions used, from the first; 0 for all")
    orders: Path | None = Field(
        default=None, description="layer orders of static methods from `vllm-buddy orders` (absent: the shipped ones)"
    )
    calibration: Path | None = Field(
        default=None, description="text to measure layer orders on that are not on file; not the text evaluated"
    )
    seed: int = Field(default=0, description="seed of the static method random")

    @property
    def library(self) -> bool | None:
        """`paths` as Artifact.router takes it."""
        return None if self.paths is None else self.paths == "library"

    @property
    def window_stride(self) -> int:
        return self.window - self.context if self.stride is None else self.stride

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.text is None and self.piqa is None:
            raise EvaluationError("nothing to measure on; give --text, --piqa or both")
        check_window(self.window, self.window_stride, self.context)
        names = [spec.name for spec in self.policy]
        for name in names:
            if names.count(name) > 1:
                raise EvaluationError(f"policy '{name}' is named twice")
        return self
