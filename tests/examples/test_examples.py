"""The examples and the snippets of README.md, run as they stand; those that need a server share one."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_buddy.cli.server_process import HOST, ServerProcess, free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SERVER_ARGUMENTS = (
    "--enforce-eager",  # a start of seconds; what is said does not depend on it
    "--max-model-len",
    "1024",
    "--kv-cache-memory-bytes",
    "256M",
    "--additional-config",
    json.dumps({"buddy": {"load": {"price": 12, "running": [1, 4]}}}),  # as auto_under_load.py asks
)
TIMEOUT_S = 580


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the embedded model."""
    with ServerProcess(SERVER_ARGUMENTS, tmp_path_factory.mktemp("server") / "log") as server:
        server.wait_until_healthy(lambda *_: None)
        yield f"http://{HOST}:{server.port}"


def run(*command: str | Path, cwd: Path = ROOT, stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """Run a command with this Python's scripts first in PATH; returns what it prints."""
    paths = (os.environ.get("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels"))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_s)
    finally:
        if process.poll() is None:  # what a script started must not outlive it
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, stdout[-3000:] + stderr[-3000:]
    return stdout


def snippet(language: str) -> str:
    """The one block of this language in README.md."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    return found


def test_every_example_is_listed_and_tested() -> None:
    """Fails if an example is added that examples/README.md does not list or this file does not run."""
    there = {path.name for path in EXAMPLES.iterdir() if path.name != "README.md" and path.suffix}
    assert there == set(re.findall(r"^\| \[([\w.]+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert [name for name in there if f'EXAMPLES / "{name}"' not in Path(__file__).read_text()] == []


def test_the_curl_of_the_readme(url: str) -> None:
    """Fails if the first request that a reader types is refused or not routed."""
    answer = json.loads(run("bash", "-c", snippet("sh").replace("localhost:8000", url.removeprefix("http://"))))
    assert answer["kv_transfer_params"]["buddy"]["depth"] == 22
    assert "Paris" in answer["choices"][0]["text"]


def test_the_python_of_the_readme(url: str) -> None:
    """Fails if the snippet for OpenAI's client does not print an answer and what it ran."""
    printed = run(sys.executable, "-", stdin=snippet("python").replace("http://localhost:8000", url))
    assert "'layers_executed_mean': 22.0" in printed


def test_openai_client(url: str) -> None:
    """Fails if one of the three ways to ask does not get an answer, or a stream does not tell its paths."""
    printed = run(sys.executable, EXAMPLES / "openai_client.py", f"{url}/v1")
    assert "at once, 22 layers: " in printed
    assert re.search(r"ran 15 layers, paths \[\[\d+, 0\]\]", printed)
    assert printed.count("side by side, budget") == 3


def test_auto_under_load(url: str) -> None:
    """Fails if requests of "auto" do not get shallower while others run."""
    lines = run(sys.executable, EXAMPLES / "auto_under_load.py", f"{url}/v1").splitlines()[1:]
    layers = [float(line.split()[1]) for line in lines]
    assert len(layers) == 4
    assert layers[0] == 30
    assert layers[-1] < 24


@pytest.mark.slow
def test_offline() -> None:
    """Fails if budgets of an offline batch are lost."""
    printed = run(sys.executable, EXAMPLES / "offline.py")
    assert (
        re.findall(r"^(\S+) +(\S+) layers", printed, re.MULTILINE)
        == [
            ("1.0", "30.0"),
            ("0.75", "22.0"),
            ("0.5", "15.0"),
        ]
        * 3
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ray_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if two replicas behind Ray's HTTP proxy do not answer, or budgets meet on one."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # short: Ray's sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", folder)
        printed = run(sys.executable, EXAMPLES / "ray_serve.py", str(free_port()), timeout_s=1700)
        logs = Path(folder, "ray", "session_latest", "logs").glob("worker-*.err")
        called = re.findall(r" (\w+) request-(\d+)-at-(\S+) -- CALL", "".join(log.read_text() for log in logs))
    assert re.findall(r"^(\S+) +(\S+) layers", printed, re.MULTILINE) == [("0.5", "15.0"), ("1.0", "30.0")] * 8
    assert len(called) == 16
    settled = {(budget, replica) for replica, number, budget in called if int(number) >= 4}
    assert len(settled) == len({replica for _, replica in settled}) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ray_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the rows of a batch lose their budgets, or do not tell what they ran."""
    pytest.importorskip("ray")
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        printed = run(sys.executable, EXAMPLES / "ray_data.py", timeout_s=1700)
    found = Counter(re.findall(r"^(\S+) +(\S+) layers", printed, re.MULTILINE))
    assert found == {("1.0", "30.0"): 3, ("0.75", "22.0"): 3, ("0.5", "15.0"): 3}


@pytest.mark.slow
def test_prune_and_compare(tmp_path: Path) -> None:
    """Fails if the pruned artifact is not the static policy of the same method, or the command line has changed."""
    printed = run(
        sys.executable, EXAMPLES / "prune_and_compare.py", text_of_the_docs(tmp_path), tmp_path / "out", "1024"
    )
    rows = {row[0]: row for row in (line.split() for line in printed.splitlines()) if len(row) > 3}
    assert {"buddy", "shortgpt", "pruned", "dense"} <= rows.keys(), printed
    assert rows["shortgpt"][-1] == rows["pruned"][-1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_train_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the chain from a text to an artifact with a predictor breaks."""
    for name, value in {"TOKENS": "2048", "SAMPLED": "3000", "SEARCH": "128", "EXAMPLES": "8"}.items():
        monkeypatch.setenv(name, value)
    run("bash", EXAMPLES / "train_your_own.sh", text_of_the_docs(tmp_path), tmp_path / "out", timeout_s=1700)
    assert json.loads((tmp_path / "out" / "artifact" / "buddy_config.json").read_text())["predictor"] is not None


@pytest.mark.slow
def test_the_notebook(tmp_path: Path) -> None:
    """Fails if a cell of the notebook raises, or its grids do not hold the layers that were counted."""
    cells = json.loads((EXAMPLES / "layers_per_token.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    body = code + (
        "\nfor answer in [*by_request, *by_token]:"
        "\n    outcome = answer.kv_transfer_params['buddy']"
        "\n    assert ran(outcome).sum(axis=0).mean() == outcome['layers_executed_mean'], outcome"
    )
    lines = "\n".join("    " + line for line in body.splitlines())
    script = tmp_path / "notebook.py"
    script.write_text(f"import matplotlib\nmatplotlib.use('agg')\nif __name__ == '__main__':\n{lines}\n")
    run(sys.executable, script, cwd=tmp_path)


def text_of_the_docs(folder: Path) -> Path:
    """A text of some length: this repository's own pages."""
    path = folder / "text.txt"
    path.write_text("\n\n".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))))
    return path
