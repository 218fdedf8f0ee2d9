"""Checks whether vLLM would load the plugin.

Commands check this before they start a server, because vLLM skips a plugin that it cannot find without a message.
"""

import os
from importlib.metadata import entry_points

from vllm_buddy.errors import ServerError
from vllm_buddy.serving.plugin import DISABLE_VARIABLE

GROUP = "vllm.general_plugins"
NAME = "buddy"


def plugin_problem() -> tuple[str, str] | None:
    """Return (reason why vLLM would not load the plugin, what to do about it), or None if it would."""
    found = [e for e in entry_points(group=GROUP) if e.name == NAME]
    if not found:
        return (
            f"there is no entry point '{NAME}' in group {GROUP}: the package is importable but not installed here",
            "run `pip install .` in a checkout of vllm_buddy, in the environment of vLLM",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        return f"VLLM_PLUGINS={allowed!r} leaves '{NAME}' out", f"add '{NAME}' to VLLM_PLUGINS, or unset it"
    if os.environ.get(DISABLE_VARIABLE, "0") not in ("", "0"):
        return f"{DISABLE_VARIABLE} is set", f"unset {DISABLE_VARIABLE}"
    try:
        found[0].load()
    except Exception as error:  # any error that the import raises is the problem to report
        return f"{found[0].value} cannot be imported ({type(error).__name__}: {error})", "install the package again"
    return None


def require_plugin() -> None:
    """Raise ServerError if vLLM would not load the plugin."""
    problem = plugin_problem()
    if problem is not None:
        raise ServerError(f"vLLM would not load the plugin: {problem[0]}; {problem[1]}")
