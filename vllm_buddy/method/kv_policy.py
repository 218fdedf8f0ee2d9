"""What a layer that a token skips leaves in that layer's KV cache."""

from vllm_buddy.errors import SettingsError

MASKED = "masked"  # no entry: later tokens of that layer do not attend to the position
KV_ONLY = "kv_only"  # K and V projected from the hidden state that passes the layer: the position stays attendable
ZERO = "zero"  # the paper's: K and V are zeros and not masked, so the position's logit is 0 and takes attention mass

KV_POLICIES = (MASKED, KV_ONLY, ZERO)


def check_kv_policy(name: str) -> None:
    """Raise SettingsError for a policy that does not exist."""
    if name not in KV_POLICIES:
        raise SettingsError(f"unknown KV policy {name!r}; known are {', '.join(KV_POLICIES)}")
