"""The server's settings: the schema of `--additional-config '{"buddy": {...}}'`, and how it is read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from vllm_buddy.errors import BudgetError, SettingsError
from vllm_buddy.method import parse_budget
from vllm_buddy.method.kv_policy import KV_ONLY, MASKED, KVPolicyName

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "buddy"
AUTO: Literal["auto"] = "auto"
ITL, TTFT = "itl", "ttft"  # the service objectives

# Settings that used to stand at the top level, and where they are.
_MOVED = {
    "auto_min": "auto.min",
    "auto_max": "auto.max",
    "price": "auto.price",
    "load_price": "load.price",
    "load_waiting": "load.waiting",
    "load_running": "load.running",
    "load_kv_use": "load.kv_use",
    "load_floor": "load.floor",
    "load_lowers_running": "load.lowers_running",
    "load_hysteresis": "load.hysteresis",
    "cuda_graphs": "graphs.enabled",
    "graph_sizes": "graphs.sizes",
    "graph_memory_mib": "graphs.memory_mib",
}


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


_Budget = Annotated[float, BeforeValidator(_budget)]
_BudgetOrAuto = Annotated[float | Literal["auto"], BeforeValidator(_budget_or_auto)]
_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Counts = Annotated[tuple[_Count, _Count], BeforeValidator(_tuple_of_json)]
_Shares = Annotated[tuple[_Share, _Share], BeforeValidator(_tuple_of_json)]
_Sizes = Annotated[tuple[_Size, ...], BeforeValidator(_tuple_of_json)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AutoSettings(_Section):
    """What budget "auto" may choose, and at which price."""

    min: _Budget | None = Field(
        default=None, description='Smallest budget that "auto" may choose. Default: `min_budget`.'
    )
    max: _Budget | None = Field(
        default=None, description='Largest budget that "auto" may choose. Default: `max_budget`.'
    )
    price: _Price | None = Field(
        default=None,
        description=(
            'Price of compute for "auto", in nats per token for all layers of the model; 0 takes the largest budget. '
            "Default: the artifact's own price."
        ),
    )


class LoadSettings(_Section):
    """How the price of budget "auto" follows the load of the server."""

    price: _Price = Field(
        description="Price when the server is fully loaded. Required: it makes the price follow the load."
    )
    waiting: _Counts = Field(
        default=(1, 8),
        description="Waiting requests at which the price starts to rise, and at which it reaches `load.price`.",
    )
    running: _Counts | None = Field(
        default=None, description="The same for running requests. Default: they do not count."
    )
    kv_use: _Shares = Field(default=(0.8, 0.95), description="The same for the share of the KV cache in use.")
    floor: _Budget | None = Field(
        default=None, description="Smallest budget that load alone leads to. Default: `auto.min`."
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


class SloSettings(_Section):
    """Latencies that the price of budget "auto" keeps."""

    itl_ms: _Milliseconds | None = Field(
        default=None,
        description=(
            "Milliseconds between two tokens of a request that the 99th percentile is to stay within. The price of "
            '"auto" then rises as far as is needed, and no further. Default: there is no such objective.'
        ),
    )
    ttft_ms: _Milliseconds | None = Field(
        default=None, description="The same for the milliseconds from a request's arrival to its first token."
    )
    floor: _Budget | None = Field(
        default=None, description="Smallest budget that the objectives alone lead to. Default: `auto.min`."
    )
    hysteresis: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of an objective by which a latency must be below it before the price falls.",
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


class GraphSettings(_Section):
    """Decode steps as CUDA graphs."""

    enabled: bool | None = Field(
        default=None,
        description=(
            "Whether decode steps are replayed as CUDA graphs, of single layers and of recurring paths. Default: true "
            "on a GPU, unless `--enforce-eager`, the reference kernels or a KV policy that cannot be captured (zero)."
        ),
    )
    sizes: _Sizes | None = Field(
        default=None,
        description=(
            "Numbers of sequences for which decode steps are captured. A step is padded to the next size; larger steps "
            "run eagerly. Default: 1, 2, 4, 8, then in growing steps to `--max-num-seqs`, at most 256."
        ),
    )
    memory_mib: _Count = Field(
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


class AffinitySettings(_Section):
    """Which data-parallel replica runs a request that names none."""

    enabled: bool = Field(
        default=True,
        description="Whether requests of like budget go to the same replica. false: vLLM balances by load alone.",
    )
    spill: _Count = Field(
        default=8,
        description=(
            "Requests that a replica may have beyond twice those of the least loaded one. Further ones go to the "
            "latter, whatever their budget."
        ),
    )


class ScheduleSettings(_Section):
    """Whether all tokens of a request run one depth, or each a depth of its own."""

    prefill: Literal["request", "token"] = Field(
        default="request",
        description=(
            "Depth of the tokens of a prompt. request: all run floor(budget * L) layers; token: each runs one of the "
            "artifact's nested paths, and the budget is a strict mean over the tokens."
        ),
    )
    decode: Literal["request", "token"] = Field(default="request", description="The same for decoded tokens.")
    saved_layers: _Count = Field(
        default=240,
        description="Layers that a request saves up at most on shallow tokens, for deeper ones later (token).",
    )

    @property
    def by_token(self) -> bool:
        """Whether any token may have a depth of its own."""
        return "token" in (self.prefill, self.decode)


class DraftSettings(_Section):
    """Drafts of the speculator DepthDrafts, for requests in lossless mode."""

    depth: _Size | None = Field(
        default=None, description="Layers that a draft runs. Default: three tenths of the model's layers."
    )
    refine_depth: _Size | None = Field(
        default=None,
        description=(
            "Layers of a second pass that checks the drafts of a step and corrects the first wrong one, before all "
            "layers do. Default: there is none."
        ),
    )
    most: _Size | None = Field(
        default=None,
        description="Draft passes after one step, at most. Default: the speculator's `num_speculative_tokens`.",
    )
    acceptance: _Share = Field(
        default=0.7,
        description=(
            "Share of drafts that is expected to be right before a request has had any. Rather too high: what is too "
            "low is not tried."
        ),
    )
    row_cost: _Share = Field(
        default=0.05,
        description=(
            "Time of one more row of drafts in a step, as a share of a step of one row. The default is what SmolLM2 "
            "takes in batches on 2 CPU cores; on a GPU rows cost less."
        ),
    )
    ngram_max: _Count = Field(
        default=4,
        description=(
            "Longest n-gram of the request's end that is looked up in what came before; what followed it there is "
            "drafted, and layers draft only where nothing is found. 0: n-grams are not used."
        ),
    )
    ngram_min: _Size = Field(default=2, description="Shortest such n-gram.")

    @model_validator(mode="after")
    def _in_order(self) -> "DraftSettings":
        if 0 < self.ngram_max < self.ngram_min:
            raise ValueError(f"drafts.ngram_max {self.ngram_max} is below drafts.ngram_min {self.ngram_min}")
        return self


class BuddySettings(_Section):
    """All server settings. The table of settings in the documentation is generated from this schema."""

    artifact: str | None = Field(
        default=None,
        description="Folder, hub id or name of a shipped artifact. Default: the shipped artifact that fits the model "
        "and the schedule.",
    )
    default_budget: _BudgetOrAuto = Field(
        default=1.0,
        description=(
            'Budget of requests that name none: a number in (0, 1], or "auto", which lets the artifact\'s Budget '
            "Predictor choose one for each prompt. If it is not given, `max_budget`."
        ),
    )
    min_budget: _Budget | None = Field(
        default=None, description="Smallest budget that a request may ask for. Default: three layers' worth."
    )
    max_budget: _Budget = Field(
        default=1.0,
        description=(
            "Largest budget that a request may ask for. Below 1, layers that no path up to it holds are neither loaded "
            "nor given a KV cache, and requests may ask neither for lossless mode nor for prompts at full depth."
        ),
    )
    prompt: Literal["routed", "full"] = Field(
        default="routed",
        description=(
            "Prompts of requests that do not say. routed: a prompt runs the budget; full: it runs all layers, and the "
            "budget is one of decoded tokens. Full prompts share the prefix cache with requests of any budget."
        ),
    )
    kv_policy: KVPolicyName | None = Field(
        default=None,
        description=(
            "What a token leaves in the KV cache of a layer that it skips. masked: no entry, nothing attends to it; "
            "kv_only: keys and values projected from the hidden state that passes; zero: zeros, as in the paper. "
            "Default: masked, or kv_only where tokens have depths of their own."
        ),
    )
    kv_layout: Literal["dense", "units"] = Field(
        default="dense",
        description=(
            "How the layers of a request lie in the KV cache. dense: a token takes the same memory at any budget; "
            "units: a token on k of L layers takes about k / L of it, so that more requests fit. Needs `kv_policy` "
            "masked."
        ),
    )
    kv_classes: _Size = Field(
        default=2,
        description=(
            "Layers of a KV block under `kv_layout` units, one of each class; a number that divides the model's "
            "layers. Fewer: closer to k / L, and more work for each step."
        ),
    )
    paths: Literal["free", "library"] | None = Field(
        default=None,
        description=(
            "free: any set of layers. library: the router picks from the artifact's fixed list of paths per depth. "
            "Default: library if the artifact has a Decision Module and a library, else free."
        ),
    )
    route_every: _Count | None = Field(
        default=None,
        description=(
            "Decoded tokens between two routing decisions (R). 1: every token; 0: the prompt's path throughout. "
            "Default: the artifact's own value, else 16."
        ),
    )
    decision_lag: _Count | None = Field(
        default=None,
        description=(
            "Number of newest tokens that a decision does not see. Default: 0, or 1 under asynchronous scheduling, "
            "which is the least possible there."
        ),
    )
    kernels: Literal["triton", "reference"] | None = Field(
        default=None,
        description=(
            "What moves rows and computes bypasses. triton: Triton kernels; reference: the same in plain PyTorch, "
            "slower. Default: triton on a GPU, vLLM's compiled layers on CPU."
        ),
    )
    schedule: ScheduleSettings = ScheduleSettings()
    drafts: DraftSettings = DraftSettings()
    auto: AutoSettings = AutoSettings()
    load: LoadSettings | None = None
    slo: SloSettings | None = None
    graphs: GraphSettings = GraphSettings()
    affinity: AffinitySettings = AffinitySettings()

    @model_validator(mode="after")
    def _one_price(self) -> "BuddySettings":
        if self.load is not None and self.slo is not None:
            raise ValueError(
                "'load' sets by hand the price that 'slo' finds from latencies; leave out one of load.price and slo"
            )
        return self

    @property
    def kv(self) -> KVPolicyName:
        """`kv_policy`, or the default that fits the schedule."""
        return self.kv_policy or (KV_ONLY if self.schedule.by_token else MASKED)

    @property
    def library(self) -> bool | None:
        """`paths` in the form of Artifact.router's argument."""
        return None if self.paths is None else self.paths == "library"

    @property
    def for_auto(self) -> list[str]:
        """Names of the given settings that concern budget "auto" alone."""
        names = [
            f"auto.{name}" for name, value in self.auto if name in self.auto.model_fields_set and value is not None
        ]
        return names + [name for name in ("load", "slo") if getattr(self, name) is not None]


def known_settings() -> dict[str, FieldInfo]:
    """The fields of all settings by name, those of a section as `section.name`."""
    fields: dict[str, FieldInfo] = {}
    for name, field in BuddySettings.model_fields.items():
        section = _section_of(field.annotation)
        fields |= {name: field} if section is None else {f"{name}.{n}": f for n, f in section.model_fields.items()}
    return fields


def parse_settings(additional_config: Any) -> BuddySettings:
    """Settings from vLLM's additional_config.

    Raises:
        SettingsError: an unknown key, a wrong type or a value out of range; lists the known keys. A key that has moved
            into a section is answered with its new name.
    """
    if not isinstance(additional_config, Mapping):
        raise SettingsError(f"additional_config must be a JSON object, found {type(additional_config).__name__}")
    raw = additional_config.get(CONFIG_KEY, {})
    known = ", ".join(known_settings())
    if not isinstance(raw, Mapping):
        raise SettingsError(f"additional_config['{CONFIG_KEY}'] is {raw!r}; expected an object with keys {known}")
    dotted = {str(key): str(key) for key in raw if key in known_settings() and "." in key}
    if moved := dotted | {key: name for key, name in _MOVED.items() if key in raw}:
        told = "; ".join(f"'{key}' is now '{name}'" for key, name in moved.items() if key != name)
        section, name = next(iter(moved.values())).split(".")
        raise SettingsError(
            f"additional_config['{CONFIG_KEY}']: {told or 'settings of a section are nested'}. Write "
            f'{{"{CONFIG_KEY}": {{"{section}": {{"{name}": ...}}}}}}. Known keys: {known}'
        )
    try:
        return BuddySettings(**raw)
    except (ValidationError, TypeError) as error:
        problems = list(map(_problem, error.errors())) if isinstance(error, ValidationError) else [str(error)]
        raise SettingsError(
            f"additional_config['{CONFIG_KEY}'] is not valid: {'; '.join(problems)}. Known keys: {known}"
        ) from None


def engine_settings(vllm_config: "VllmConfig") -> BuddySettings:
    """The settings as the config hook left them, for the processes of the engine. `artifact` is a folder there."""
    return parse_settings(vllm_config.additional_config)


def _problem(details: Any) -> str:
    """One error of pydantic's as `'key': what is wrong (found value)`."""
    if not details["loc"]:
        return str(details["msg"])
    name = ".".join(map(str, details["loc"]))
    if details["type"] == "missing":
        return f"'{name}' is required (found {details['input']!r})"
    if (own := details.get("ctx", {}).get("error")) is not None:  # raised by a validator above, and says what was found
        return f"'{name}': {own}"
    return f"'{name}': {details['msg']} (found {details['input']!r})"


def _section_of(annotation: Any) -> type[_Section] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, _Section)), None)
