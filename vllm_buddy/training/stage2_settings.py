"""The settings of `vllm-buddy train-budget`, read from a YAML file and KEY=VALUE overrides."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_buddy.models.find import MODEL_OR_DEFAULT_HELP
from vllm_buddy.models.torch_device import Dtype
from vllm_buddy.training.sources import Files, UserPath, UserPlace

FEWEST_HELD_OUT = 2  # samples, whose spread is a figure of the log


class Stage2Settings(BaseModel):
    """Settings of stage 2. They are recorded in run.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: UserPath = Field(description="folder for the artifact with its Budget Predictor, and for the log")
    artifact: UserPlace | None = Field(
        default=None, description="folder or name of the artifact that gets a predictor; absent: the shipped artifact"
    )
    model: UserPath | None = Field(default=None, description=MODEL_OR_DEFAULT_HELP)
    data: Files = Field(min_length=1, description="files of requests like those that will be served")
    data_dir: UserPath | None = Field(
        default=None, description="folder of the files in `data`, if their paths are relative"
    )
    examples: int = Field(default=600, ge=8, description="samples of each file, multiplied by its weight")
    depths: tuple[int, ...] | Literal["every"] = Field(
        default="every",
        description="numbers of layers that the predictor chooses from; every: all that the artifact is trained for",
    )
    context: int = Field(default=64, ge=1, description="tokens of running text that the predictor decides from")
    prompt: int = Field(
        default=192, ge=1, description="largest number of prompt tokens; rows with longer prompts are left out"
    )
    answer: int = Field(default=128, ge=1, description="largest number of tokens that are scored")
    hidden: int = Field(default=16, ge=1, description="width of the predictor's hidden layer")
    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    batch: int = Field(default=256, ge=1, description="samples per step")
    group: int = Field(
        default=0,
        ge=0,
        description="depths that are drawn from the policy for each sample; 0: every depth once, without sampling",
    )
    temperature: float = Field(
        default=0.05, gt=0, allow_inf_nan=False, description="weight of the entropy bonus, in nats per token"
    )
    max_price: float = Field(
        default=4.0,
        gt=0,
        allow_inf_nan=False,
        description="largest price that is trained, in nats per token for all layers; the smallest is 0",
    )
    mean_budget: float = Field(
        default=0.75,
        gt=0,
        lt=1,
        description="the artifact's own price is the one at which the mean budget comes nearest to this",
    )
    learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False, description="learning rate of AdamW")
    weight_decay: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="weight decay of AdamW")
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of the samples that choose the weights to keep")
    dtype: Dtype = Field(default="bfloat16", description="dtype in which losses are measured")
    seed: int = Field(default=0, ge=0, description="seed of all random draws")
    cache_dir: UserPath | None = Field(default=None, description="folder for the measured losses; absent: `out`")

    @model_validator(mode="after")
    def _check(self) -> "Stage2Settings":
        if self.depths != "every" and (len(self.depths) < 2 or list(self.depths) != sorted(set(self.depths))):
            raise ValueError(f"depths must be at least two and ascend: {self.depths}")
        if self.group == 1:
            raise ValueError("a group of one has nothing to compare; set group to 0 or to 2 and more")
        if int(min(self.examples * source.weight for source in self.data) * self.held_out) < 1:
            raise ValueError(f"held_out ({self.held_out}) of {self.examples} examples is none")
        if int(sum(round(self.examples * source.weight) for source in self.data) * self.held_out) < FEWEST_HELD_OUT:
            raise ValueError(
                f"held_out ({self.held_out}) of {self.examples} examples is one sample, and figures of fewer than "
                f"{FEWEST_HELD_OUT} have no spread; raise held_out or examples"
            )
        return self
