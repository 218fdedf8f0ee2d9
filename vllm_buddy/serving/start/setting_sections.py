"""The sections of the server's settings, and the types of their values."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from vllm_buddy.errors import BudgetError
from vllm_buddy.method import parse_budget

AUTO: Literal["auto"] = "auto"
ITL, TTFT = "itl", "ttft"  # the service objectives


def _budget(value: Any) -> Any:
    try:
        return value if value is None else parse_budget(value)
    except BudgetError as error:
        raise ValueError(str(error)) from None


def _budget_or_auto(value: Any) -> Any:
    if value == AUTO:
        return value
    try:
        return parse_budget(value)
    except BudgetError as error:
        raise ValueError(f'{error} or "{AUTO}"') from None


def _tuple_of_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Budget = Annotated[float, BeforeValidator(_budget)]
BudgetOrAuto = Annotated[float | Literal["auto"], BeforeValidator(_budget_or_auto)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Size = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Counts = Annotated[tuple[Count, Count], BeforeValidator(_tuple_of_json)]
Shares = Annotated[tuple[Share, Share], BeforeValidator(_tuple_of_json)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(_tuple_of_json)]


class Section(BaseModel):
    """Settings that stand together: unknown keys and other types than the described ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AutoSettings(Section):
    """What budget "auto" may choose, and at which price."""

    min: Budget | None = Field(
        default=None,
        description='Smallest budget that "auto" may choose. Default: `min_budget`. It never chooses less than the '
        "smallest depth of the artifact's Budget Predictor, which is 0.5 for the shipped one.",
    )
    max: Budget | None = Field(
        default=None, description='Largest budget that "auto" may choose. Default: `max_budget`.'
    )
    price: Price | None = Field(
        default=None,
        description=(
            'Price of compute for "auto", in nats per token for all layers of the model; 0 takes the largest budget. '
            "Default: the artifact's own price."
        ),
    )


class LoadSettings(Section):
    """How the price of budget "auto" follows the load of the server."""

    price: Price = Field(
        description="Price when the server is fully loaded. Required: it makes the price follow the load."
    )
    waiting: Counts = Field(
        default=(1, 8),
        description="Waiting requests at which the price starts to rise, and at which it reaches `load.price`.",
    )
    running: Counts | None = Field(
        default=None, description="The same for running requests. Default: they do not count."
    )
    kv_use: Shares = Field(default=(0.8, 0.95), description="The same for the share of the KV cache in use.")
    floor: Budget | None = Field(
        default=None,
        description="Load alone never takes a request below this budget. Default: `auto.min`.",
    )
    lowers_running: bool = Field(
        default=True,
        description=(
            "Whether a rising load also lowers running requests, from their next token on. They are not raised again. "
            "false: the load affects arriving requests only."
        ),
    )
    hysteresis: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description=(
            "How far the load must fall before the price falls, as a share of the distance between the two values of a "
            "signal."
        ),
    )

    @field_validator("waiting", "running", "kv_use")
    @classmethod
    def _ascending(cls, pair: tuple[float, float] | None) -> tuple[float, float] | None:
        if pair is not None and not pair[0] < pair[1]:
            raise ValueError(f"the first of the two must be the smaller, found {list(pair)}")
        return pair


class SloSettings(Section):
    """Latencies that budget "auto" keeps."""

    itl_ms: Milliseconds | None = Field(
        default=None,
        description=(
            "Milliseconds between two tokens of a request that the 99th percentile is to stay within. Requests of "
            'budget "auto" then run as few layers as that takes, and no fewer. Default: there is no such objective.'
        ),
    )
    ttft_ms: Milliseconds | None = Field(
        default=None, description="The same for the milliseconds from a request's arrival to its first token."
    )
    floor: Budget | None = Field(
        default=None,
        description="The objectives alone never take a request below this budget. Default: `auto.min`.",
    )
    hysteresis: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of an objective by which a latency must be below it before requests get deeper.",
    )
    headroom: float = Field(
        default=0.05,
        ge=0,
        lt=1,
        description=(
            "Share of an objective that is left for what the engine does not see, such as the way through the API "
            "server. The engine aims at the rest."
        ),
    )

    @model_validator(mode="after")
    def _any(self) -> "SloSettings":
        if not self.objectives_s:
            raise ValueError("slo has no objective; give slo.itl_ms, slo.ttft_ms or both")
        return self

    @property
    def objectives_s(self) -> dict[str, float]:
        """The objectives by name, in seconds."""
        given = {ITL: self.itl_ms, TTFT: self.ttft_ms}
        return {name: ms / 1e3 for name, ms in given.items() if ms is not None}


class GraphSettings(Section):
    """Decode steps as CUDA graphs."""

    enabled: bool | None = Field(
        default=None,
        description=(
            "Whether decode steps are replayed as CUDA graphs, of single layers and of recurring paths. Default: true "
            "on a GPU, unless `--enforce-eager`, the reference kernels, pipeline parallelism, the speculator eagle3 "
            "or a KV policy that cannot be captured (zero)."
        ),
    )
    sizes: Sizes | None = Field(
        default=None,
        description=(
            "Numbers of sequences for which decode steps are captured. A step is padded to the next size; larger steps "
            "run eagerly. Default: 1, 2, 4, 8, then in growing steps to `--max-num-seqs`, at most 256."
        ),
    )
    memory_mib: Count = Field(
        default=1024,
        description=(
            "GPU memory for captured graphs, in MiB, taken from the KV cache. The least recently used paths are "
            "dropped first."
        ),
    )

    @field_validator("sizes")
    @classmethod
    def _growing(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sizes is not None and (not sizes or list(sizes) != sorted(set(sizes))):
            raise ValueError(f"sizes must be one or more, in ascending order without repetition, found {list(sizes)}")
        return sizes


class AffinitySettings(Section):
    """Which data-parallel replica runs a request that names none."""

    enabled: bool = Field(
        default=True,
        description="Whether requests of like budget go to the same replica. false: vLLM balances by load alone.",
    )
    spill: Count = Field(
        default=8,
        description=(
            "Requests that a replica may have beyond twice those of the least loaded one. Further ones go to the "
            "latter, whatever their budget."
        ),
    )


class ScheduleSettings(Section):
    """Whether all tokens of a request run one depth, or each a depth of its own."""

    prefill: Literal["request", "token"] = Field(
        default="request",
        description=(
            "Depth of the tokens of a prompt. request: all run floor(budget * L) layers; token: each runs one of the "
            "artifact's nested paths, and the budget is a strict mean over the tokens."
        ),
    )
    decode: Literal["request", "token"] = Field(default="request", description="The same for decoded tokens.")
    saved_layers: Count = Field(
        default=240,
        description="Layers that a request saves up at most on shallow tokens, for deeper ones later (token).",
    )

    @property
    def by_token(self) -> bool:
        """Whether any token may have a depth of its own."""
        return "token" in (self.prefill, self.decode)


class DraftSettings(Section):
    """Drafts of the speculator DepthDrafts, for requests in lossless mode."""

    depth: Size | None = Field(
        default=None,
        description=(
            "Layers that a draft runs: an exit that the artifact was trained for, or else the path of the library. "
            "Default: the artifact's first exit, without one three tenths of the model's layers."
        ),
    )
    refine_depth: Size | None = Field(
        default=None,
        description=(
            "Layers of a second pass that checks the drafts of a step and corrects the first wrong one, before all "
            "layers do; an exit of the artifact as for `depth`. Default: there is none."
        ),
    )
    vocabulary: Literal["frequent", "all"] = Field(
        default="frequent",
        description=(
            "Tokens that drafts of layers choose among: the artifact's frequent ones, whose rows of the head alone are "
            "read, or all. Artifacts without such a list have all."
        ),
    )
    most: Size | None = Field(
        default=None,
        description="Draft passes after one step, at most. Default: the speculator's `num_speculative_tokens`.",
    )
    acceptance: Share = Field(
        default=0.7,
        description=(
            "Share of drafts that is expected to be right before a request has had any. Set it too high rather than "
            "too low: drafts that are thought bad are never tried."
        ),
    )
    row_cost: Share | None = Field(
        default=None,
        description=(
            "Time of one more row of drafts in a step, as a share of a step of one row. Default: measured while "
            "serving, as are draft passes; if it is given, both stay as expected."
        ),
    )
    ngram_max: Count = Field(
        default=4,
        description=(
            "Longest n-gram of the request's end that is looked up in what came before; what followed it there is "
            "drafted, and layers draft only where nothing is found. 0: n-grams are not used."
        ),
    )
    ngram_min: Size = Field(default=2, description="Shortest such n-gram.")

    @model_validator(mode="after")
    def _in_order(self) -> "DraftSettings":
        if 0 < self.ngram_max < self.ngram_min:
            raise ValueError(f"drafts.ngram_max {self.ngram_max} is below drafts.ngram_min {self.ngram_min}")
        return self
