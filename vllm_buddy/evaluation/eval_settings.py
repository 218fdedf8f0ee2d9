"""The settings of `vllm-buddy eval`."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vllm_buddy.errors import BudgetError, EvaluationError
from vllm_buddy.evaluation.policy import FULL_PROMPT, SHUFFLED, TOKEN, PolicySpec
from vllm_buddy.evaluation.windows import check_window
from vllm_buddy.method import parse_budget
from vllm_buddy.method.kv_policy import MASKED, KVPolicyName
from vllm_buddy.models.find import MODEL_OR_DEFAULT_HELP
from vllm_buddy.models.torch_device import Dtype

# Variants of policies that engine vllm cannot score, and why.
_HF_ONLY = {
    FULL_PROMPT: "in vLLM, a window is one prompt and would run all layers",
    TOKEN: "engine vllm serves with one depth per request",
    SHUFFLED: "no server deals paths at random",
}


def _budgets(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return tuple(parse_budget(float(word)) for word in value.split(","))
    except BudgetError as error:
        raise EvaluationError(str(error)) from None
    except ValueError:
        raise EvaluationError(
            f"budgets are {value!r}, but must be numbers in (0, 1] with commas between them"
        ) from None


def _policies(value: Any) -> Any:
    return tuple(PolicySpec.parse(word) for word in value.split(",")) if isinstance(value, str) else value


class EvalSettings(BaseModel):
    """Settings of one evaluation. The options of `vllm-buddy eval` are generated from these fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: Path | None = Field(default=None, description="UTF-8 text file for perplexity, KL and agreement")
    piqa: Path | None = Field(
        default=None, description="multiple-choice questions: JSONL file with goal, sol1, sol2 and label (0 or 1)"
    )
    budgets: Annotated[tuple[float, ...], BeforeValidator(_budgets)] = Field(
        default=(1.0, 0.875, 0.75, 0.5), description="budgets, separated by commas"
    )
    policy: Annotated[tuple[PolicySpec, ...], BeforeValidator(_policies)] = Field(
        default=tuple(map(PolicySpec.parse, ("buddy", "shortgpt", "sleb"))),
        description="policies, separated by commas: buddy, a static method, or NAME=DIR for another artifact. "
        "buddy:token runs a path for each token, with the budget as their mean, buddy:shuffled deals these paths at "
        "random, buddy:frozen runs one path per depth, buddy:prompt_only never re-routes, and buddy:full_prompt runs "
        "the context at full depth. The unrouted model always runs",
    )
    model: Path | None = Field(default=None, description=MODEL_OR_DEFAULT_HELP)
    artifact: str | None = Field(
        default=None,
        description="folder or name of the artifact of policy buddy (absent: the shipped one that fits the model)",
    )
    engine: Literal["hf", "vllm"] = Field(
        default="hf",
        description="hf: this package's routed forward on Hugging Face models. vllm: the plugin in vLLM, without KL",
    )
    dtype: Dtype = Field(default="bfloat16", description="dtype of the model: bfloat16 or float32")
    kv_policy: KVPolicyName = Field(
        default=MASKED, description="what a skipped layer leaves in the KV cache: masked, kv_only or zero"
    )
    paths: Literal["free", "library"] | None = Field(
        default=None,
        description="free: any layers. library: paths from the fixed list of the artifact (absent: as in serving)",
    )
    route_every: int | None = Field(
        default=None,
        ge=0,
        description="scored tokens between two decisions. 1: a decision for each token. 0: none after the context "
        "(absent: as in serving)",
    )
    window: int = Field(default=512, description="tokens in each window of text")
    context: int = Field(
        default=64, description="tokens at the start of a window that decide its first path and are not scored"
    )
    stride: int | None = Field(
        default=None,
        description="tokens between the starts of two windows (absent: window - context, which scores each token once)",
    )
    text_skip: int = Field(default=0, ge=0, description="tokens that are skipped at the start of the text")
    text_tokens: int = Field(default=65536, ge=0, description="tokens of text to use; 0 for all")
    piqa_rows: int = Field(default=0, ge=0, description="number of questions to use, from the first; 0 for all")
    orders: Path | None = Field(
        default=None,
        description="layer orders of static methods, a file of `vllm-buddy orders` (absent: the shipped orders)",
    )
    calibration: Path | None = Field(
        default=None, description="text file to measure missing layer orders on; must not be the text that is evaluated"
    )
    seed: int = Field(default=0, description="seed of the static method random")

    @property
    def library(self) -> bool | None:
        """`paths` in the form that Artifact.router takes."""
        return None if self.paths is None else self.paths == "library"

    @property
    def window_stride(self) -> int:
        return self.window - self.context if self.stride is None else self.stride

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.text is None and self.piqa is None:
            raise EvaluationError("nothing to measure on; give --text, --piqa or both")
        check_window(self.window, self.window_stride, self.context)
        for spec in self.policy:
            if self.engine == "vllm" and spec.variant in _HF_ONLY:
                raise EvaluationError(f"policy '{spec}' needs engine hf: {_HF_ONLY[spec.variant]}")
        names = [spec.name for spec in self.policy]
        for name in names:
            if names.count(name) > 1:
                raise EvaluationError(f"policy '{name}' is named twice")
        return self
