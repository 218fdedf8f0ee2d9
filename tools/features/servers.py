"""Starts the servers on which the cases run: stock vLLM and `--model-impl buddy`, alike in everything else."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools.features.client import MAX_MODEL_LEN, MAX_NUM_SEQS, MODEL, Client
from vllm_buddy.cli.server_process import ServerProcess

# fp32, so that batches of other sizes round so little that greedy tokens are the same. Steps of 128 tokens, so that
# long prompts take several.
_ARGUMENTS = (
    "--served-model-name",
    MODEL,
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    str(MAX_MODEL_LEN),
    "--max-num-batched-tokens",
    "128",
    "--max-num-seqs",
    str(MAX_NUM_SEQS),
    "--kv-cache-memory-bytes",
    "128M",
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
    "--enable-prompt-tokens-details",
    "--enable-scale-out",  # for /inference/v1/generate
    "--structured-outputs-config",
    '{"backend": "xgrammar", "disable_any_whitespace": true}',
)
# The pages of an operator are there in developer mode only.
PROGRAM = ("env", "VLLM_SERVER_DEV_MODE=1", "VLLM_ENABLE_V1_MULTIPROCESSING=1", sys.executable, "-m")


@contextmanager
def server(
    model: Path, log: Path, *, artifact: str | None, arguments: Sequence[str] = (), program: Sequence[str] = PROGRAM
) -> Iterator[ServerProcess]:
    """A server of `model` that is ready, and is stopped in the end.

    artifact: None starts stock vLLM. arguments: added to the usual ones.

    Raises:
        ServerError: it does not become ready.
    """
    if artifact is None:
        module, own = ("vllm.entrypoints.openai.api_server",), ["--model", str(model)]
    else:
        module = ("vllm_buddy", "serve")  # type: ignore[assignment]
        own = [str(model), "--additional-config", json.dumps({"buddy": {"artifact": artifact}})]
    with ServerProcess([*own, *_ARGUMENTS, *arguments], log, program=(*program, *module)) as process:
        process.wait_until_healthy(lambda _elapsed, _gist: None)
        yield process


def client(process: ServerProcess, model: Path, budget: float | str | None) -> Client:
    """A client of a server of `model`."""
    config = json.loads((model / "config.json").read_text())
    return Client(process.port, budget, config["num_hidden_layers"], config["vocab_size"])
