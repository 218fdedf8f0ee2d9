"""The KV policies by name: what a token leaves in the KV cache of a layer that it skips."""

from typing import Final, Literal, get_args

from vllm_buddy.errors import SettingsError

KVPolicyName = Literal["masked", "kv_only", "zero"]

MASKED: Final = "masked"  # no entry: later tokens do not attend to the position in that layer
KV_ONLY: Final = "kv_only"  # K and V projected from the hidden state that passes the layer: the position is attended to
ZERO: Final = "zero"  # K and V are zeros, as in the paper: the position's logit is 0, so it takes attention mass

KV_POLICIES: tuple[KVPolicyName, ...] = get_args(KVPolicyName)


def check_kv_policy(name: str) -> None:
    """Raise SettingsError for a policy that does not exist."""
    if name not in KV_POLICIES:
        raise SettingsError(f"unknown KV policy {name!r}; known are {', '.join(KV_POLICIES)}")
