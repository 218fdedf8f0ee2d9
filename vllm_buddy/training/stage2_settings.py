"""Everything that decides what `vllm-buddy train-budget` writes: a YAML file, and KEY=VALUE overrides on top of it."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_buddy.training.stage1_settings import DataSource


class Stage2Settings(BaseModel):
    """Settings of stage 2. The record in run.yaml is made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path = Field(description="folder of the run: the artifact with its Budget Predictor, and the log")
    artifact: str | None = Field(
        default=None, description="folder or name of the artifact that gets a predictor (absent: the shipped one)"
    )
    model: Path | None = Field(default=None, description="folder of a Hugging Face model; absent: the embedded one")
    data: tuple[DataSource, ...] = Field(min_length=1, description="requests of the kinds that will be served")
    data_dir: Path | None = Field(default=None, description="where relative files of `data` lie")
    examples: int = Field(default=600, ge=8, description="samples of each file, times its weight")
    depths: tuple[int, ...] | Literal["every"] = Field(
        default="every",
        description="numbers of layers that the predictor chooses among; every: all that the artifact was trained for",
    )
    context: int = Field(default=64, ge=1, description="tokens that decide, of running text")
    prompt: int = Field(
        default=192, ge=1, description="tokens of the longest prompt; rows with longer ones are left out"
    )
    answer: int = Field(default=128, ge=1, description="tokens that are scored, at most")
    hidden: int = Field(default=16, ge=1, description="width of the predictor")
    steps: int = Field(default=1000, ge=1, description="optimizer steps")
    batch: int = Field(default=256, ge=1, description="samples per step")
    group: int = Field(
        default=0, ge=0, description="depths drawn for each sample, from the policy; 0: every depth once, no sampling"
    )
    temperature: float = Field(
        default=0.05, gt=0, allow_inf_nan=False, description="nats per token; weight of the entropy bonus"
    )
    max_price: float = Field(
        default=4.0, gt=0, allow_inf_nan=False, description="prices from 0 to this one are trained, in nats per token"
    )
    mean_budget: float = Field(
        default=0.75, gt=0, lt=1, description="the artifact's price is the one that comes to this mean budget"
    )
    learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    held_out: float = Field(default=0.2, gt=0, lt=1, description="share of the samples that decide when to stop")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="in which losses are measured")
    seed: int = Field(default=0, ge=0)
    cache_dir: Path | None = Field(default=None, description="where measured losses are kept; absent: `out`")

    @model_validator(mode="after")
    def _check(self) -> "Stage2Settings":
        if self.depths != "every" and (len(self.depths) < 2 or list(self.depths) != sorted(set(self.depths))):
            raise ValueError(f"depths must be at least two and ascend: {self.depths}")
        if self.group == 1:
            raise ValueError("a group of one has nothing to compare; set group to 0 or to 2 and more")
        if int(min(self.examples * source.weight for source in self.data) * self.held_out) < 1:
            raise ValueError(f"held_out ({self.held_out}) of {self.examples} examples is none")
        return self
