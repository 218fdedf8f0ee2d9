"""Server settings: `--additional-config '{"buddy": {...}}'`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from vllm_buddy.errors import BudgetError, SettingsError
from vllm_buddy.method import parse_budget

CONFIG_KEY = "buddy"
AUTO: Literal["auto"] = "auto"

_Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]
_Share = Annotated[float, Field(ge=0, le=1)]


class BuddySettings(BaseModel):
    """Server settings of vllm_buddy. The table in the README is generated from this schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    artifact: str | None = Field(
        default=None,
        description="Folder, hub id or name of a shipped artifact. Absent: the shipped artifact that fits the model.",
    )
    default_budget: float | Literal["auto"] = Field(
        default=1.0,
        description=(
            'Budget of requests that send none: in (0, 1], or "auto", which the artifact\'s Budget Predictor chooses '
            "for each prompt."
        ),
    )
    min_budget: float | None = Field(
        default=None, description="Smallest budget a request may ask for. Absent: three layers' worth."
    )
    kv_policy: Literal["masked", "kv_only", "zero"] = Field(
        default="masked",
        description=(
            "What a skipped layer leaves in the KV cache. masked: no entry, nothing attends to it; kv_only: keys and "
            "values projected from the hidden state that passes; zero: zeros, as in the paper."
        ),
    )
    paths: Literal["free", "library"] | None = Field(
        default=None,
        description=(
            "free: any layers. library: the router picks among the artifact's fixed list of paths per depth. Absent: "
            "library if the artifact has a Decision Module and a library, else free."
        ),
    )
    route_every: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Decoded tokens between two decisions (R). 1: every token; 0: the prompt's path. Absent: what the artifact "
            "says suits it, else 16."
        ),
    )
    decision_lag: int | None = Field(
        default=None,
        ge=0,
        description=(
            "How many of the newest tokens a decision does not see. Absent: 0, or 1 under asynchronous scheduling, "
            "which is the least it allows."
        ),
    )
    kernels: Literal["triton", "reference"] | None = Field(
        default=None,
        description=(
            "What moves and bypasses rows. triton: Triton kernels; reference: the same in plain PyTorch, slower. "
            "Absent: triton on a GPU, and vLLM's compiled layers on CPU."
        ),
    )
    cuda_graphs: bool | None = Field(
        default=None,
        description=(
            "Whether decode steps are replayed as CUDA graphs, of each layer and of paths that recur. Absent: on a "
            "GPU, unless `--enforce-eager`, another form of the kernels or a KV policy that cannot be captured (zero)."
        ),
    )
    graph_sizes: tuple[_Size, ...] | None = Field(
        default=None,
        description=(
            "Numbers of sequences for which decode steps are captured; steps are padded to the next, larger ones run "
            "eagerly. Absent: 1, 2, 4, 8, then in growing steps to `--max-num-seqs`, at most 256."
        ),
    )
    graph_memory_mib: _Count = Field(
        default=1024,
        description=(
            "GPU memory that captured graphs may take, in MiB; the KV cache gets that much less. Paths that were not "
            "used for longest are dropped first."
        ),
    )
    auto_min: float | None = Field(
        default=None, description='Smallest budget that "auto" may choose. Absent: `min_budget`.'
    )
    auto_max: float | None = Field(default=None, description='Largest budget that "auto" may choose. Absent: 1.0.')
    price: _Price | None = Field(
        default=None,
        description=(
            'Price of compute for "auto", in nats per token for all layers of the model; 0 takes the largest budget. '
            "Absent: what the artifact says."
        ),
    )
    load_price: _Price | None = Field(
        default=None,
        description="Price when the server is fully loaded. Absent: the price does not follow the load.",
    )
    load_waiting: tuple[_Count, _Count] = Field(
        default=(1, 8),
        description="Waiting requests at which the price starts to rise, and at which it is `load_price`.",
    )
    load_running: tuple[_Count, _Count] | None = Field(
        default=None, description="The same for running requests. Absent: they do not count."
    )
    load_kv_use: tuple[_Share, _Share] = Field(
        default=(0.8, 0.95), description="The same for the share of the KV cache in use."
    )
    load_floor: float | None = Field(
        default=None, description="Smallest budget that load alone brings. Absent: `auto_min`."
    )
    load_lowers_running: bool = Field(
        default=True,
        description=(
            "Whether a load that rises lowers requests that run as well, from their next token on; they are not raised "
            "again, and count in `load_running` themselves. false: load decides on arriving requests alone."
        ),
    )
    load_hysteresis: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description=(
            "How far the load must fall before the price falls, as a share of the distance between the two values of a "
            "signal."
        ),
    )

    @property
    def library(self) -> bool | None:
        """`paths` as Artifact.router takes it."""
        return None if self.paths is None else self.paths == "library"

    @property
    def for_auto(self) -> list[str]:
        """Those given that count for budget "auto" alone."""
        return [name for name in self._given if name == "price" or name.startswith(("auto_", "load_"))]

    @property
    def _given(self) -> list[str]:
        names = (name for name in type(self).model_fields if name in self.model_fields_set)
        return [name for name in names if getattr(self, name) is not None]

    @field_validator("default_budget", "min_budget", "auto_min", "auto_max", "load_floor", mode="before")
    @classmethod
    def _budget_in_range(cls, value: Any, info: ValidationInfo) -> Any:
        is_default = info.field_name == "default_budget"
        if (value is None and not is_default) or (value == AUTO and is_default):
            return value
        try:
            return parse_budget(value)
        except BudgetError as error:
            raise ValueError(f'{error} or "{AUTO}"' if is_default else str(error)) from None

    @field_validator("load_waiting", "load_running", "load_kv_use", "graph_sizes", mode="before")
    @classmethod
    def _tuple_of_json(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("load_waiting", "load_running", "load_kv_use")
    @classmethod
    def _ascending(cls, pair: tuple[float, float] | None) -> tuple[float, float] | None:
        if pair is not None and not pair[0] < pair[1]:
            raise ValueError("the first of the two must be the smaller")
        return pair

    @field_validator("graph_sizes")
    @classmethod
    def _growing(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if sizes is not None and (not sizes or list(sizes) != sorted(set(sizes))):
            raise ValueError("sizes must grow from one to the next, and there must be one")
        return sizes

    @model_validator(mode="after")
    def _load_is_switched_on(self) -> "BuddySettings":
        of_load = [name for name in self._given if name.startswith("load_")]
        if of_load and self.load_price is None:
            raise ValueError(f"{', '.join(of_load)} without load_price, which switches the price under load on")
        return self


def parse_settings(additional_config: Any) -> BuddySettings:
    """Settings from vLLM's additional_config.

    Raises:
        SettingsError: an unknown key, a wrong type or a value out of range; lists the known keys.
    """
    if not isinstance(additional_config, Mapping):
        raise SettingsError(f"additional_config must be a JSON object, found {type(additional_config).__name__}")
    raw = additional_config.get(CONFIG_KEY, {})
    known = ", ".join(BuddySettings.model_fields)
    if not isinstance(raw, Mapping):
        raise SettingsError(f"additional_config['{CONFIG_KEY}'] is {raw!r}; expected an object with keys {known}")
    try:
        return BuddySettings(**raw)
    except (ValidationError, TypeError) as error:
        problems = (
            [
                f"'{'.'.join(map(str, e['loc']))}': {e['msg']} (found {e['input']!r})" if e["loc"] else e["msg"]
                for e in error.errors()
            ]
            if isinstance(error, ValidationError)
            else [str(error)]
        )
        raise SettingsError(
            f"additional_config['{CONFIG_KEY}'] is not valid: {'; '.join(problems)}. Known keys: {known}"
        ) from None
