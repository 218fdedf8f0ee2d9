"""The server's settings: the schema of `--additional-config '{"buddy": {...}}'`, and how it is read."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from vllm_buddy.errors import SettingsError
from vllm_buddy.method.kv_policy import KV_ONLY, MASKED, KVPolicyName
from vllm_buddy.serving.start.setting_sections import (
    AffinitySettings,
    AutoSettings,
    Budget,
    BudgetOrAuto,
    Count,
    DraftSettings,
    GraphSettings,
    LoadSettings,
    ScheduleSettings,
    Section,
    Size,
    SloSettings,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CONFIG_KEY = "buddy"

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


class BuddySettings(Section):
    """All server settings. The table of settings in the documentation is generated from this schema."""

    artifact: str | None = Field(
        default=None,
        description="Folder, hub id or name of a shipped artifact. Default: the shipped artifact that fits the model "
        "and the schedule.",
    )
    base_check: Literal["weights", "shape"] = Field(
        default="weights",
        description="What the model must have in common with the one that the artifact was made for: `weights`, its "
        "shape and a hash of its norms and embedding; or `shape` alone, for a quantised copy whose quantiser changes "
        "the norms (AWQ, SmoothQuant).",
    )
    default_budget: BudgetOrAuto = Field(
        default=1.0,
        description=(
            'Budget of requests that name none: a number in (0, 1], or "auto", which lets the artifact\'s Budget '
            "Predictor choose one for each prompt. If it is not given, `max_budget`."
        ),
    )
    min_budget: Budget | None = Field(
        default=None, description="Smallest budget that a request may ask for. Default: three layers' worth."
    )
    max_budget: Budget = Field(
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
            "budget is one of decoded tokens. Full prompts share the prefix cache with each other at any budget."
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
    kv_classes: Size = Field(
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
    route_every: Count | None = Field(
        default=None,
        description=(
            "Decoded tokens between two routing decisions (R). 1: every token; 0: the prompt's path throughout. "
            "Default: the artifact's own value, else 16."
        ),
    )
    decision_lag: Count | None = Field(
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
            raise ValueError("'load' says by hand what 'slo' finds from latencies; leave out one of load.price and slo")
        return self

    @property
    def kv(self) -> KVPolicyName:
        """`kv_policy`, or the default that fits the schedule."""
        return self.kv_policy or (KV_ONLY if self.schedule.by_token else MASKED)

    @property
    def artifact_folder(self) -> Path:
        """`artifact` where the config hook has put a folder in its place: in the processes of the engine."""
        assert self.artifact is not None
        return Path(self.artifact)

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


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
