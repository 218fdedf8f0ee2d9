"""The schema of `buddy_config.json`, the configuration of an artifact."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_buddy.artifact.fingerprint import BaseModelIdentity, Line
from vllm_buddy.method.budget import MIN_DEPTH
from vllm_buddy.method.router import OMEGA

FORMAT_VERSION = 6

_LARGE = 1e6  # beyond any useful value, and far from overflow
_Budget = Annotated[float, Field(gt=0, le=1)]


class PriorConfig(BaseModel):
    """The origin of the prior, the static layer importance."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    indicator: Line = Field(description="an indicator of `vllm-buddy prior`, a static pruning method, or `searched`")
    calibration: Line = Field(description="name of the calibration text")
    num_tokens: int = Field(ge=0, description="number of calibration tokens")


class LoraConfig(BaseModel):
    """The rank and the scale (alpha / rank) of the change of the base weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(ge=1)
    alpha: float = Field(ge=-_LARGE, le=_LARGE, allow_inf_nan=False)


class PricePoint(BaseModel):
    """The mean budget that a price of compute leads to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    price: float = Field(ge=0, le=_LARGE, description="nats per token for all layers of the model")
    budget: float = Field(
        gt=0, le=1, description="mean budget at this price, measured on requests held out from training"
    )


class PredictorConfig(BaseModel):
    """The Budget Predictor's grid of depths, and its prices."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    depths: tuple[int, ...] = Field(min_length=2, description="depths that it chooses among, ascending")
    price: float = Field(ge=0, le=_LARGE, description="price of compute if neither the server nor the request sets one")
    prices: tuple[PricePoint, ...] = Field(default=(), description="mean budgets of other prices, ascending")

    @field_validator("depths")
    @classmethod
    def _ascending(cls, depths: tuple[int, ...]) -> tuple[int, ...]:
        if list(depths) != sorted(set(depths)):
            raise ValueError(f"depths must ascend: {depths}")
        return depths


class TokenConfig(BaseModel):
    """The nested paths of schedule `token`, and the prices at which tokens choose among them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paths: tuple[tuple[int, ...], ...] = Field(
        min_length=2, description="layer sets, each a subset of the next; the last is the whole model"
    )
    prices: tuple[PricePoint, ...] = Field(
        min_length=2, description="mean budgets of prices where no account limits the choice, ascending in budget"
    )
    decay: float = Field(ge=0, lt=1, description="of the mean over recent tokens that the router sees, per token")

    @model_validator(mode="after")
    def _nested(self) -> "TokenConfig":
        _check_nested(self.paths)
        budgets = [point.budget for point in self.prices]
        if budgets != sorted(budgets):
            raise ValueError(f"the budgets of prices must ascend: {budgets}")
        return self


class DraftConfig(BaseModel):
    """The exits that draft in lossless mode, each with an adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exits: tuple[tuple[int, ...], ...] = Field(
        min_length=1,
        description="layer sets, each a subset of the next; the first one drafts, a deeper one may check its drafts",
    )
    rank: int = Field(ge=1, description="rank of the adapters, and of the bypasses of gaps")
    eps: float = Field(ge=0, le=1, description="epsilon of their RMSNorm, equal to the base model's")
    gaps: bool = Field(
        default=False,
        description="whether each gap of an exit's path has a bypass of its own; false: skipped layers have theirs",
    )
    vocabulary: int | None = Field(
        default=None, ge=1, description="number of tokens that drafts choose among; absent: all of the vocabulary"
    )

    @model_validator(mode="after")
    def _nested(self) -> "DraftConfig":
        _check_nested(self.exits)
        return self


class BuddyConfig(BaseModel):
    """The content of `buddy_config.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = Field(ge=1, description="this schema's version")
    name: Line = Field(description="name of the artifact")
    base_model: BaseModelIdentity = Field(description="the model that the artifact was made for")
    prior: PriorConfig
    omega: float = Field(
        default=OMEGA,
        ge=-_LARGE,
        le=_LARGE,
        allow_inf_nan=False,
        description="weight of the standardised prior that is added to the trained scores",
    )
    has_decision_module: bool = Field(description="false: paths follow the prior alone")
    library: dict[int, list[list[int]]] | None = Field(
        default=None,
        min_length=1,
        description="for each depth, the layer sets that the router chooses from with `paths: library`",
    )
    route_every: int | None = Field(
        default=None, ge=0, description="tokens between two routing decisions; absent: the default number"
    )
    recipe: Literal["bypass", "paper", "distill"] | None = Field(
        default=None,
        description="how the repair of skipped layers was trained; absent: nothing but routing was trained",
    )
    budgets: tuple[_Budget, _Budget] | None = Field(default=None, description="smallest and largest budget of training")
    bypass_rank: int = Field(default=0, ge=0, description="rank of the bypasses of skipped layers; 0: there are none")
    bypass_eps: float = Field(
        default=0.0, ge=0, le=1, description="epsilon of the bypasses' RMSNorm, equal to the base model's"
    )
    lora: LoraConfig | None = Field(
        default=None, description="the change of base weights, which applies at every budget; absent: there is none"
    )
    token: TokenConfig | None = Field(
        default=None, description="routing of single tokens; absent: the artifact has no schedule `token`"
    )
    predictor: PredictorConfig | None = Field(default=None, description="absent: there is no budget `auto`")
    drafts: DraftConfig | None = Field(
        default=None, description="absent: lossless mode drafts on paths of the library, with the bypass alone"
    )

    @model_validator(mode="after")
    def _token_paths_fit(self) -> "BuddyConfig":
        if self.token is not None:
            last = self.base_model.num_layers - 1
            shallowest, deepest = self.token.paths[0], self.token.paths[-1]
            if deepest != tuple(range(last + 1)) or not {0, last} <= set(shallowest) or len(shallowest) < MIN_DEPTH:
                raise ValueError(
                    f"the paths of schedule token must hold layers 0 and {last} and at least {MIN_DEPTH} layers, the "
                    "last one all layers"
                )
        return self

    @model_validator(mode="after")
    def _exits_fit(self) -> "BuddyConfig":
        last = self.base_model.num_layers - 1
        for layers in self.drafts.exits if self.drafts is not None else ():
            if not MIN_DEPTH <= len(layers) <= last or (layers[0], layers[-1]) != (0, last):
                raise ValueError(
                    f"an exit holds layers 0 and {last}, at least {MIN_DEPTH} layers and not all; one holds {layers}"
                )
        size = self.base_model.vocab_size
        if self.drafts is not None and self.drafts.vocabulary is not None and self.drafts.vocabulary >= size:
            raise ValueError(f"drafts choose among {self.drafts.vocabulary} tokens, of which the model has {size}")
        return self

    @model_validator(mode="after")
    def _grid_fits(self) -> "BuddyConfig":
        if self.predictor is None:
            return self
        depths, num_layers = self.predictor.depths, self.base_model.num_layers
        allowed = {*(self.library or range(MIN_DEPTH, num_layers)), num_layers}
        if unknown := sorted({*depths} - allowed):
            raise ValueError(f"the Budget Predictor chooses among depths {depths}, but there is no path of {unknown}")
        return self


def _check_nested(paths: Sequence[tuple[int, ...]]) -> None:
    """Raise ValueError unless the layers of each path ascend, and each path is a subset of the next."""
    for shallow, deep in pairwise(paths):
        if not set(shallow) < set(deep):
            raise ValueError(f"each path must be a subset of the next; {shallow} is not one of {deep}")
    if any(list(path) != sorted(set(path)) for path in paths):
        raise ValueError("the layers of a path must ascend")
