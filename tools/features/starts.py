"""Ways to start vLLM, each with a few of the cases: features that a running server cannot change."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tools.features.case import Differs, Refused
from tools.features.client import BUDGETS, MODEL, Client, token_ids
from tools.features.endings import vanish_in_decode
from tools.features.prompts import chunked_prompt, prefix_caching
from tools.features.sampling import greedy_in_a_batch, prompt_logprobs, several_samples
from tools.features.servers import PROGRAM, client, server
from vllm_buddy.cli.server_process import free_port
from vllm_buddy.errors import ServerError

_TEXT = "The road went on and on, and"
_RUN_BATCH_TIMEOUT_S = 600.0
_RANK = 8  # of the LoRA adapter
# On a CPU, vLLM must be told which cores each stage has.
_TWO_CPUS = ("env", "VLLM_CPU_OMP_THREADS_BIND=0|1", *PROGRAM)


@dataclass(frozen=True)
class Start:
    """One way to start.

    run: (model, artifact, folder for logs) -> Refused, Differs or None; raises AssertionError where it does not work.
    """

    name: str
    run: Callable[[Path, str, Path], Refused | Differs | None]


def _with(
    arguments: Sequence[str], *checks: Callable[[Client], Any], program: Sequence[str] = PROGRAM
) -> Callable[[Path, str, Path], None]:
    """Run `checks` at each budget on a server that is started with `arguments` added."""

    def run(model: Path, artifact: str, folder: Path) -> None:
        log = folder / ("start" + "".join(arguments).replace("/", "") + ".log")
        with server(model, log, artifact=artifact, arguments=arguments, program=program) as process:
            for budget in BUDGETS:
                for check in checks or _USUAL:
                    check(client(process, model, budget))

    return run


_USUAL = (several_samples, greedy_in_a_batch, prompt_logprobs, chunked_prompt, prefix_caching, vanish_in_decode)


def _priorities(c: Client) -> None:
    """Requests of all priorities at once have the tokens that they have alone."""
    asks = [(f"{i}. {_TEXT}", i % 3) for i in range(12)]
    alone = [token_ids(c.complete(prompt)) for prompt, _ in asks]
    at_once = c.at_once(*(lambda p=p, q=q: c.complete(p, priority=q, max_tokens=8) for p, q in asks))
    assert [token_ids(answer) for answer in at_once] == alone


def _several_api_servers(c: Client) -> None:
    """Budgets and outcomes go through each server; one scrape counts the requests of all."""
    before = c.metric("vllm_buddy:budget_count")
    expected = token_ids(c.complete(_TEXT))
    answers = c.at_once(*[lambda: c.complete(_TEXT)] * 8)
    assert all(token_ids(answer) == expected for answer in answers)
    assert "did you mean 'buddy_budget'?" in c.refusal(prompt="a", vllm_xargs={"buddy_buget": 0.5})
    assert c.metric("vllm_buddy:budget_count") - before >= 9


def _run_batch(model: Path, artifact: str, folder: Path) -> None:
    """`vllm run-batch`: a file of requests in, a file of answers out."""
    bodies: list[dict[str, Any]] = [{"vllm_xargs": {"buddy_budget": b}} for b in (*BUDGETS, 7)]
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": [{"role": "user", "content": _TEXT}], "max_tokens": 6, **body},
        }
        for i, body in enumerate(bodies)
    ]
    asked, answered = folder / "batch.jsonl", folder / "batch-answers.jsonl"
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(asked), "-o", str(answered)]
    command += ["--model", str(model), "--served-model-name", MODEL, "--model-impl", "buddy", "--enforce-eager"]
    command += ["--max-model-len", "256", "--kv-cache-memory-bytes", "64M"]
    command += ["--additional-config", json.dumps({"buddy": {"artifact": artifact}})]
    with (folder / "run-batch.log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=_RUN_BATCH_TIMEOUT_S, check=False)
    assert done.returncode == 0
    answers = {a["custom_id"]: a for a in map(json.loads, answered.read_text().splitlines())}
    for number in range(len(BUDGETS)):
        told = answers[str(number)]["response"]["body"]["kv_transfer_params"]["buddy"]
        assert told["auto"] == (BUDGETS[number] == "auto")
        assert told["layers_executed_mean"] == told["depth"]
    assert "buddy_budget" in json.dumps(answers[str(len(BUDGETS))])


def _block_size_16(model: Path, artifact: str, folder: Path) -> Refused:
    """vLLM's attention on CPU takes multiples of 32."""
    for name in (artifact, None):
        log = folder / f"block-size-16-{name}.log"
        try:
            with server(model, log, artifact=name, arguments=["--block-size", "16"]):
                raise AssertionError("the server started")
        except ServerError:
            assert "No common block size for 16" in log.read_text()
    return Refused("by stock vLLM too: its attention on CPU takes multiples of 32")


def _data_parallel(model: Path, artifact: str, folder: Path) -> None:
    """Two engines behind one API server: each routes its own requests."""
    arguments = ["--data-parallel-size", "2", "--data-parallel-rpc-port", str(free_port())]
    with server(model, folder / "data-parallel.log", artifact=artifact, arguments=arguments) as process:
        for budget in BUDGETS:
            c = client(process, model, budget)
            expected = token_ids(c.complete(_TEXT))
            assert all(token_ids(a) == expected for a in c.at_once(*[lambda c=c: c.complete(_TEXT)] * 6))


def _compiled(model: Path, artifact: str, folder: Path) -> None:
    """vLLM's compilation, one graph per layer; the other starts are eager."""
    log = folder / "compiled.log"
    with server(model, log, artifact=artifact, arguments=["--no-enforce-eager"]) as process:
        for budget in BUDGETS:
            for check in _USUAL:
                check(client(process, model, budget))


def _lora(model: Path, artifact: str, folder: Path) -> None:
    """An adapter changes the answers of the requests that name it, and of no others, in one batch."""
    adapter = _write_adapter(model, folder / "adapter")
    arguments = ["--enable-lora", "--max-lora-rank", str(_RANK), "--lora-modules", f"adapted={adapter}"]
    with server(model, folder / "lora.log", artifact=artifact, arguments=arguments) as process:
        for budget in BUDGETS:
            c = client(process, model, budget)
            plain, adapted = (token_ids(c.complete(_TEXT, model=name)) for name in (MODEL, "adapted"))
            assert plain != adapted
            names = [MODEL, "adapted"] * 4
            at_once = c.at_once(*[lambda c=c, name=name: c.complete(_TEXT, model=name) for name in names])
            assert [token_ids(answer) for answer in at_once] == [plain, adapted] * 4


def _write_adapter(model: Path, folder: Path) -> Path:
    """Write a random LoRA adapter of all query projections in PEFT's format; returns `folder`."""
    rng = np.random.default_rng(0)
    tensors = {}
    with safe_open(model / "model.safetensors", framework="np") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys() if ".q_proj.weight" in name}  # noqa: SIM118
    for name, (num_out, num_in) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = rng.normal(0, 0.3, (_RANK, num_in)).astype(np.float32)
        tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.3, (num_out, _RANK)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": 16, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


STARTS = (
    Start("--enable-lora", _lora),
    Start("--pipeline-parallel-size 2", _with(["--pipeline-parallel-size", "2"], program=_TWO_CPUS)),
    Start("--max-num-seqs 1", _with(["--max-num-seqs", "1"])),
    Start("--block-size 16", _block_size_16),
    Start("--block-size 32", _with(["--block-size", "32"])),
    Start("--block-size 128", _with(["--block-size", "128"])),
    Start("--scheduling-policy priority", _with(["--scheduling-policy", "priority"], _priorities, *_USUAL)),
    Start(
        "--no-enable-prefix-caching", _with(["--no-enable-prefix-caching"], *(u for u in _USUAL if u != prefix_caching))
    ),
    Start("--no-enforce-eager (compiled)", _compiled),
    Start("--api-server-count 2", _with(["--api-server-count", "2"], _several_api_servers, several_samples)),
    Start("--data-parallel-size 2", _data_parallel),
    Start("vllm run-batch", _run_batch),
)
