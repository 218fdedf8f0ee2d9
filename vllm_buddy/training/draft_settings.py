"""The settings of `vllm-buddy train-drafts`, read from a YAML file and KEY=VALUE overrides."""

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.models.find import MODEL_OR_DEFAULT_HELP
from vllm_buddy.models.torch_device import Dtype
from vllm_buddy.training.sources import Sources, UserPath, UserPlace


class DraftTrainingSettings(BaseModel):
    """Settings of the search for draft paths and of the training of their exits. They are recorded in run.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: UserPath = Field(description="folder for the artifact with its draft exits, and for the log")
    artifact: UserPlace | None = Field(
        default=None, description="folder or name of the artifact that gets them; absent: the shipped artifact"
    )
    model: UserPath | None = Field(default=None, description=MODEL_OR_DEFAULT_HELP)
    data: Sources = Field(min_length=1, description="training text: files, and data sets of `datasets`")
    data_dir: UserPath | None = Field(
        default=None, description="folder of the files in `data`, if their paths are relative"
    )
    depth: int | None = Field(
        default=None,
        ge=MIN_DEPTH,
        description="layers of the path that drafts (absent: the number from min_depth to max_depth that is predicted "
        "to gain most)",
    )
    min_depth: int = Field(default=6, ge=MIN_DEPTH, description="fewest layers that are considered for drafts")
    max_depth: int = Field(default=12, ge=MIN_DEPTH, description="most layers that are considered for drafts")
    refine_depth: int | None = Field(
        default=None,
        description="layers of a second exit, on a path that holds the first, for `drafts.refine_depth` in serving "
        "(absent: there is none)",
    )
    vocabulary: int | None = Field(
        default=None,
        ge=1,
        description="tokens that drafts choose among, the most frequent of the training text (absent: all)",
    )
    row_cost: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="time of one more row of drafts in a step, as a share of a step of one row, where depths are "
        "compared",
    )
    search_tokens: int = Field(default=2560, ge=1, description="tokens of text that paths are compared on")
    gaps: bool = Field(
        default=True,
        description="whether each gap of a path, the layers that it skips one after the other, gets a bypass of its "
        "own; false: skipped layers have those of the artifact, and adapters alone are trained",
    )
    init_tokens: int = Field(
        default=16384, ge=1, description="tokens from which the bypasses of gaps are computed, in closed form"
    )
    rank: int = Field(default=256, ge=1, description="rank of the adapters and of the bypasses of gaps")
    tokens: int = Field(default=150_000, ge=1, description="training tokens; a token that is used twice counts twice")
    held_out_tokens: int = Field(
        default=8192, ge=1, description="tokens on which drafts are counted before and after training, not trained on"
    )
    length: int = Field(default=256, ge=16, description="tokens per sequence")
    batch: int = Field(default=2, ge=1, description="sequences per optimizer step")
    learning_rate: float = Field(
        default=5e-3, gt=0, allow_inf_nan=False, description="peak learning rate of the adapters (AdamW)"
    )
    gap_learning_rate: float = Field(
        default=1.5e-3, gt=0, allow_inf_nan=False, description="peak learning rate of the bypasses of gaps (Muon)"
    )
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="weight decay of both")
    warmup_steps: int = Field(default=20, ge=0, description="optimizer steps of linear warm-up")
    clip: float = Field(
        default=1.0, gt=0, description="largest norm of an exit's gradient; larger ones are scaled down"
    )
    top_logits: int = Field(default=64, ge=1, description="logits of the full model that exits are trained on")
    dtype: Dtype = Field(default="bfloat16", description="dtype of the model's passes")
    seed: int = Field(default=0, ge=0, description="seed of all random draws")

    @model_validator(mode="after")
    def _check(self) -> "DraftTrainingSettings":
        if self.min_depth > self.max_depth:
            raise ValueError(f"min_depth ({self.min_depth}) is more than max_depth ({self.max_depth})")
        deepest = self.depth or self.max_depth
        if self.refine_depth is not None and self.refine_depth <= deepest:
            raise ValueError(f"refine_depth ({self.refine_depth}) must be more than the {deepest} layers of drafts")
        if self.num_steps < 1:
            raise ValueError(f"{self.tokens} tokens are less than one batch of {self.batch} x {self.length}")
        if self.gaps and self.rank % 2:
            raise ValueError(f"a bypass of a gap starts as pairs of units, so rank must be even, not {self.rank}")
        if self.num_held_out < 1:
            raise ValueError(f"held_out_tokens ({self.held_out_tokens}) are less than one sequence of {self.length}")
        return self

    @property
    def num_steps(self) -> int:
        return self.tokens // (self.batch * self.length)

    @property
    def num_held_out(self) -> int:
        """Sequences that are held out."""
        return self.held_out_tokens // self.length

    @property
    def depths(self) -> tuple[int, ...]:
        """Depths of the drafts that are compared, ascending."""
        return tuple(range(self.min_depth, self.max_depth + 1)) if self.depth is None else (self.depth,)
