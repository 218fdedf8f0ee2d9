"""The settings of `vllm-buddy train`."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_buddy.models.find import MODEL_OR_DEFAULT_HELP
from vllm_buddy.models.quantised import Quantisation
from vllm_buddy.models.torch_device import Dtype
from vllm_buddy.training.settings_file import read_settings_file
from vllm_buddy.training.sources import Sources, UserPath, UserPlace

FEWEST_WINDOWS = 4  # of the fit of a Decision Module, which holds out a quarter

# Settings that leave the loss curve as it is, or may change while a run stands. What a run goes out from has a hash of
# its own, in which the weights of `model` are.
_WITHOUT_EFFECT = {
    "model",
    "base_model_id",
    "decide_every",
    "out",
    "cache_dir",
    "save_every",
    "name",
    "data_dir",
    "tokens",
    "checkpoint_activations",
    "shard_base",
}


class Stage1Settings(BaseModel):
    """Settings of stage 1. They are recorded in run.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    out: UserPath = Field(description="folder for artifact, checkpoint and log; a stopped run in it is resumed")
    data: Sources = Field(min_length=1, description="training text: files, and data sets of `datasets`")
    data_dir: UserPath | None = Field(
        default=None, description="folder of the files in `data`, if their paths are relative"
    )
    model: UserPath | None = Field(default=None, description=MODEL_OR_DEFAULT_HELP)
    base_model_id: str | None = Field(default=None, description="hub id of the model (absent: the folder's name)")
    name: str | None = Field(default=None, description="name of the artifact (absent: the name of `out`)")
    recipe: Literal["bypass", "distill", "paper"] = Field(
        default="bypass",
        description="bypass: low-rank repair of skipped layers, trained by KL to the full model; base weights do not "
        "change. distill: LoRA, trained by KL to the full model. paper: Decision Module and LoRA, cross-entropy",
    )
    paths: str = Field(
        default="searched",
        description="which layers run while the repair is trained. searched: the best static path of each depth, given "
        "the bypass. learned: a Decision Module chooses, trained straight-through. Or the name of a static method of "
        "`vllm-buddy orders`",
    )
    prior: str = Field(default="taylor", description="static method whose layer order `paths: learned` starts from")
    orders: UserPath | None = Field(
        default=None,
        description="file of `vllm-buddy orders` with the order of the static method that `paths` or `prior` names "
        "(absent: the shipped orders)",
    )
    router_windows: int = Field(
        default=0,
        ge=0,
        description="sequences on which paths are compared to fit a Decision Module, 4 or more; 0: none is fitted",
    )
    library: int = Field(
        default=6, ge=2, description="largest number of paths per depth that the fitted Decision Module picks from"
    )
    min_budget: float = Field(default=0.5, gt=0, lt=1, description="smallest budget that is trained")
    rank: int = Field(default=64, ge=1, description="rank of the bypass or of LoRA")
    lora_alpha: float = Field(
        default=16.0, gt=0, allow_inf_nan=False, description="alpha of LoRA; its change is scaled by alpha / rank"
    )
    tokens: int = Field(
        default=1_000_000,
        ge=1,
        description="training tokens; a token that is used twice counts twice. A stopped run may go on with another "
        "number: the learning rate then ends where that ends",
    )
    length: int = Field(default=256, ge=16, description="tokens per sequence")
    batch: int = Field(default=8, ge=1, description="sequences per optimizer step")
    micro_batch: int = Field(default=1, ge=1, description="sequences per forward pass; gradients are accumulated")
    checkpoint_activations: bool = Field(
        default=False,
        description="compute a layer's activations again in the backward pass instead of keeping them (gradient "
        "checkpointing): less memory, about a third more time",
    )
    learning_rate: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="peak learning rate of the bypass or of LoRA"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="of the bypass; the Decision Module and LoRA always take adamw. muon's updates have the size of "
        "adamw's, so learning_rate is that of adamw",
    )
    router_learning_rate: float = Field(
        default=1e-3, gt=0, allow_inf_nan=False, description="peak learning rate of the Decision Module"
    )
    warmup_steps: int = Field(default=20, ge=0, description="optimizer steps of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="weight decay of AdamW")
    clip: float = Field(default=1.0, gt=0, description="largest norm of the gradient; larger ones are scaled down")
    top_logits: int = Field(default=64, ge=1, description="logits of the full model that are kept for each token")
    kv_policy: str = Field(
        default="masked", description="what a skipped layer leaves in the KV cache: masked, kv_only or zero"
    )
    schedule: Literal["request", "token"] = Field(
        default="request",
        description="request: all tokens of a sequence run its depth. token: the depth is a mean over tokens, each of "
        "which runs one of a few nested paths",
    )
    token_depths: tuple[int, ...] = Field(
        default=(), description="depths of the nested paths of schedule token, ascending, without the full depth"
    )
    token_windows: int = Field(
        default=256, ge=10, description="sequences on which the router of schedule token is fitted first"
    )
    refit_tokens: int = Field(
        default=256_000,
        ge=1,
        description="training tokens after which the router of schedule token is fitted again, to what tokens cost in "
        "the second half of training so far",
    )
    start_from: UserPlace | None = Field(
        default=None,
        description="artifact with a bypass, by folder or name, whose paths and bypass training starts from; absent: "
        "they are computed",
    )
    route_every: int = Field(
        default=16, ge=0, description="tokens between two changes of a path, as in serving; 0: paths do not change"
    )
    first_share: float = Field(
        default=0.6,
        ge=0,
        le=1,
        description="share of the sequences that run the first of the searched paths of their depth, the best one for "
        "all text; the others draw one of the rest",
    )
    full_prompt_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of the sequences whose beginning runs all layers, as prompts do that a server or a request "
        "asks to run at full depth; only the tokens after it teach something",
    )
    decide_every: int | None = Field(
        default=None,
        ge=0,
        description="tokens between two decisions in serving, written to the artifact; absent: the server's default",
    )
    init_tokens: int = Field(
        default=16384, ge=0, description="tokens of the regression that the bypass starts from; 0: it starts from zeros"
    )
    explore_tokens: int = Field(
        default=0, ge=0, description="part of `tokens` that is trained on random paths before paths are searched"
    )
    search_tokens: int = Field(
        default=2560, ge=1, description="tokens of text that paths are compared on in the search"
    )
    dtype: Dtype = Field(default="bfloat16", description="dtype of the forward pass")
    base_quantisation: Quantisation | None = Field(
        default=None,
        description="int8 or nf4: the base model's linear layers in 8 or 4 bits, which saves memory; the artifact is "
        "one of the unquantised model all the same (absent: not quantised)",
    )
    shard_base: bool = Field(
        default=False,
        description="share the base model's weights out among the processes of `accelerate launch` instead of keeping "
        "all of them in each; layers are gathered as they run",
    )
    seed: int = Field(default=0, ge=0, description="seed of all random draws")
    save_every: int = Field(default=50, ge=1, description="optimizer steps between checkpoints")
    cache_dir: UserPath | None = Field(default=None, description="folder for the full model's logits; absent: `out`")

    @model_validator(mode="after")
    def _check(self) -> "Stage1Settings":
        if self.batch % self.micro_batch:
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        if self.recipe == "bypass" and self.rank % 2:
            raise ValueError(f"a bypass starts as pairs of units: rank must be even, not {self.rank}")
        if self.recipe == "paper" and self.paths != "learned":
            raise ValueError("recipe `paper` trains the Decision Module: set paths to learned")
        if (self.schedule == "token") != bool(self.token_depths):
            raise ValueError("token_depths go with schedule token, which needs them")
        if list(self.token_depths) != sorted(set(self.token_depths)):
            raise ValueError(f"token_depths must ascend: {self.token_depths}")
        if self.schedule == "token" and (self.recipe != "bypass" or self.kv_policy != "kv_only"):
            raise ValueError("schedule token needs recipe bypass and kv_policy kv_only")
        if self.schedule == "token" and self.paths == "learned":
            raise ValueError("schedule token needs one path of each depth; set paths to searched or to a static method")
        if self.full_prompt_share and (self.schedule == "token" or self.paths == "learned"):
            raise ValueError("full_prompt_share is for sequences of one searched or static path; set it to 0")
        if 0 < self.router_windows < FEWEST_WINDOWS:
            raise ValueError(
                f"router_windows is {self.router_windows}; a quarter is held out, so set it to 0 or to "
                f"{FEWEST_WINDOWS} and more"
            )
        if self.start_from is not None and self.paths not in ("searched", "learned"):
            raise ValueError(
                f"start_from brings its paths along, so {self.paths} would be ignored; set paths to searched or leave "
                "out start_from"
            )
        if self.start_from is not None and (self.explore_tokens or self.recipe != "bypass"):
            raise ValueError("start_from is for recipe bypass, and leaves nothing to explore")
        if self.shard_base and self.base_quantisation is not None:
            raise ValueError(
                "shard_base and base_quantisation cannot be combined: a weight of bitsandbytes cannot be split by rows"
            )
        if self.optimizer == "muon" and self.recipe != "bypass":
            raise ValueError("optimizer muon is for recipe bypass")
        if self.tokens - self.explore_tokens < self.batch * self.length:
            raise ValueError(
                f"{self.tokens} tokens, {self.explore_tokens} of them for random paths, leave less than one batch of "
                f"{self.batch} x {self.length}"
            )
        if self.explore_tokens and self.paths != "searched":
            raise ValueError("explore_tokens are for paths that are searched afterwards; set paths to searched")
        return self

    @property
    def num_steps(self) -> int:
        return self.tokens // (self.batch * self.length)

    @property
    def regresses(self) -> bool:
        """Whether the bypass starts from a regression."""
        return self.recipe == "bypass" and self.init_tokens > 0 and self.start_from is None

    @property
    def explored_tokens(self) -> int:
        """Tokens that are trained on random paths: `explore_tokens` in whole steps."""
        return self.explore_tokens // (self.batch * self.length) * self.batch * self.length

    @property
    def refit_steps(self) -> int:
        """Optimizer steps between two fits of the router of schedule token."""
        return max(1, self.refit_tokens // (self.batch * self.length))

    @property
    def router_context(self) -> int:
        """Tokens at the start of a sequence that a router decides from; paths are compared on the tokens after them."""
        return self.length // 4

    @property
    def digest(self) -> str:
        """Hash of every setting that changes the loss curve, but for `tokens`, which may change while a run stands."""
        fields = self.model_dump_json(exclude=_WITHOUT_EFFECT)
        return hashlib.sha256(fields.encode()).hexdigest()[:16]

    @classmethod
    def read(cls, config: Path | None, overrides: dict[str, str]) -> "Stage1Settings":
        """See `read_settings_file`."""
        return read_settings_file(cls, config, overrides)
