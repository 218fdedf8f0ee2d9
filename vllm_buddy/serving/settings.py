"""Server settings: `--additional-config '{"buddy": {...}}'`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_buddy.errors import BudgetError, SettingsError
from vllm_buddy.method import parse_budget

CONFIG_KEY = "buddy"


class BuddySettings(BaseModel):
    """Server settings of vllm_buddy. The table in the README is generated from this schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    artifact: str | None = Field(
        default=None,
        description="Folder, hub id or name of a shipped artifact. Absent: the shipped artifact that fits the model.",
    )
    default_budget: float = Field(default=1.0, description="Budget of requests that send none, in (0, 1].")
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

    @property
    def library(self) -> bool | None:
        """`paths` as Artifact.router takes it."""
        return None if self.paths is None else self.paths == "library"

    @field_validator("default_budget", "min_budget", mode="before")
    @classmethod
    def _budget_in_range(cls, value: Any) -> Any:
        if value is None:
            return None
        try:
            return parse_budget(value)
        except BudgetError as error:
            raise ValueError(str(error)) from None


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
            [f"'{'.'.join(map(str, e['loc']))}': {e['msg']} (found {e['input']!r})" for e in error.errors()]
            if isinstance(error, ValidationError)
            else [str(error)]
        )
        raise SettingsError(
            f"additional_config['{CONFIG_KEY}'] is not valid: {'; '.join(problems)}. Known keys: {known}"
        ) from None
