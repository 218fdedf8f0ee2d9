"""Everything that decides what `vllm-buddy train` writes: a YAML file, and KEY=VALUE overrides on top of it."""

import hashlib
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_buddy.errors import TrainingError

Settings = TypeVar("Settings", bound=BaseModel)


class DataSource(BaseModel):
    """A file of training text."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: Path = Field(
        description="*.txt: plain text; *.json (a list) or *.jsonl: rows with `text`, or with `instruction`, `input`, "
        "`output`, which go through the model's chat template"
    )
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="share of the training sequences")
    share: float = Field(default=1.0, gt=0, le=1, description="only this first part of the file is used")


class Stage1Settings(BaseModel):
    """Settings of stage 1. The record in run.yaml is made from it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path = Field(description="folder of the run: artifact, checkpoint, log; a stopped run in it is resumed")
    data: tuple[DataSource, ...] = Field(min_length=1, description="training text")
    data_dir: Path | None = Field(default=None, description="where relative files of `data` lie")
    model: Path | None = Field(default=None, description="folder of a Hugging Face model; absent: the embedded one")
    base_model_id: str | None = Field(default=None, description="hub id of the model (absent: the folder's name)")
    name: str | None = Field(default=None, description="name of the artifact (absent: the name of `out`)")
    recipe: Literal["bypass", "distill", "paper"] = Field(
        default="bypass",
        description="bypass: low-rank repair of skipped layers, KL to the full model, base untouched; distill: LoRA, "
        "KL; paper: Decision Module and LoRA, cross-entropy",
    )
    paths: str = Field(
        default="searched",
        description="which layers run while the repair is trained. searched: the best static path of each depth given "
        "the bypass; learned: a Decision Module, straight-through; or a static method of `vllm-buddy orders`",
    )
    prior: str = Field(default="taylor", description="static order that `learned` starts from")
    router_windows: int = Field(
        default=0,
        ge=0,
        description="sequences on which paths are compared, to fit a Decision Module; 0: none",
    )
    library: int = Field(
        default=6, ge=2, description="paths per depth, at most, that the fitted Decision Module picks from"
    )
    min_budget: float = Field(default=0.5, gt=0, lt=1, description="smallest budget trained for")
    rank: int = Field(default=64, ge=1, description="rank of the bypass or of LoRA")
    lora_alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    tokens: int = Field(default=1_000_000, ge=1, description="training tokens, each counted as often as it is used")
    length: int = Field(default=256, ge=16, description="tokens per sequence")
    batch: int = Field(default=8, ge=1, description="sequences per optimizer step")
    micro_batch: int = Field(default=1, ge=1, description="sequences per forward pass; gradients are accumulated")
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    router_learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False, description="of the Decision Module")
    warmup_steps: int = Field(default=20, ge=0)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient")
    top_logits: int = Field(default=64, ge=1, description="logits of the full model that are kept per token")
    kv_policy: str = Field(default="masked", description="what a skipped layer leaves in the KV cache")
    route_every: int = Field(default=16, ge=0, description="tokens between decisions, as in serving")
    decide_every: int | None = Field(
        default=None,
        ge=0,
        description="tokens between decisions that the artifact asks serving for; absent: its default",
    )
    init_tokens: int = Field(default=16384, ge=0, description="tokens of the bypass's first regression; 0: zeros")
    explore_tokens: int = Field(
        default=0, ge=0, description="of `tokens`, those spent on random paths before paths are searched"
    )
    search_tokens: int = Field(default=2560, ge=1, description="tokens on which paths are searched")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="of the forward pass")
    seed: int = Field(default=0, ge=0)
    save_every: int = Field(default=50, ge=1, description="steps between checkpoints")
    cache_dir: Path | None = Field(default=None, description="for the full model's logits; absent: `out`")

    @model_validator(mode="after")
    def _check(self) -> "Stage1Settings":
        if self.batch % self.micro_batch:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        if self.recipe == "bypass" and self.rank % 2:
            raise ValueError(f"a bypass starts as pairs of units: rank must be even, not {self.rank}")
        if self.recipe == "paper" and self.paths != "learned":
            raise ValueError("recipe `paper` trains the Decision Module: set paths to learned")
        if self.tokens - self.explore_tokens < self.batch * self.length:
            raise ValueError(
                f"{self.tokens} tokens, {self.explore_tokens} of them for exploring, leave less than one batch of "
                f"{self.batch} x {self.length}"
            )
        if self.explore_tokens and self.paths != "searched":
            raise ValueError("explore_tokens are for paths that are searched afterwards; set paths to searched")
        return self

    @property
    def num_steps(self) -> int:
        return self.tokens // (self.batch * self.length)

    @property
    def router_context(self) -> int:
        """Tokens of a sequence that decide when paths are compared on those behind them."""
        return self.length // 4

    @property
    def digest(self) -> str:
        """Changes with anything that changes the loss curve."""
        fields = self.model_dump_json(exclude={"out", "cache_dir", "save_every", "name", "data_dir"})
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, config: Path, overrides: dict[str, str]) -> "Stage1Settings":
        """See `read_settings`."""
        return read_settings(cls, config, overrides)


def read_settings(settings: type[Settings], config: Path, overrides: dict[str, str]) -> Settings:
    """Settings from a YAML file, then from overrides, whose values are YAML too.

    Raises:
        TrainingError: the file cannot be read, a key is unknown or a value is not allowed.
    """
    try:
        loaded = yaml.safe_load(config.read_text())
        values: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
        if not isinstance(loaded, dict):
            raise TrainingError(f"{config} must hold `key: value` lines")
        values |= {key: yaml.safe_load(text) for key, text in overrides.items()}
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"cannot read {config}: {error}") from None
    except yaml.YAMLError as error:
        raise TrainingError(f"{config} or an override is not YAML: {error}") from None
    unknown = sorted(set(values) - set(settings.model_fields))
    if unknown:
        raise TrainingError(f"unknown settings {', '.join(unknown)}; known are {', '.join(settings.model_fields)}")
    try:
        return settings(**values)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())
        raise TrainingError(f"not a valid setting: {problems}") from None
