"""From a model and a text to answers at three budgets, with the commands that a user types."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.harness.tiny_models import NUM_LAYERS, load_model, save_tiny_model
from tests.importance.conftest import with_byte_tokenizer
from vllm_buddy.artifact import load_artifact
from vllm_buddy.cli.server_process import HOST, ServerProcess
from vllm_buddy.method import RequestRoute, depth_for_budget
from vllm_buddy.method.reference import generate
from vllm_buddy.models.folder import load_tokenizer

BUDGETS = (1.0, 0.75, 0.5)
PROMPT = "The quick brown fox"
NUM_TOKENS = 12
TEXT = "The quick brown fox jumps over the lazy dog, {} times in {} days.\n"
COMMAND_TIMEOUT_S = 600.0
START_TIMEOUT_S = 400.0  # about 20 s on two idle cores


def vllm_buddy(*words: str) -> str:
    """Run a command; returns what it printed."""
    command = [sys.executable, "-m", "vllm_buddy", *words]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_train_evaluate_serve_and_ask(tmp_path: Path) -> None:
    """Fails if what one command writes is not what the next one takes, or a served answer is not the trained one."""
    model = with_byte_tokenizer(save_tiny_model(tmp_path / "model", "qwen3"))
    text, artifact = tmp_path / "text.txt", tmp_path / "artifact"
    text.write_text("".join(TEXT.format(i * i, i) for i in range(200)))

    settings = {"model": model, "data": f"[{{file: {text}}}]", "out": artifact, "tokens": 4096, "length": 64}
    settings |= {"rank": 8, "init_tokens": 512, "search_tokens": 256, "dtype": "float32", "batch": 4, "warmup_steps": 2}
    assert f"wrote artifact 'artifact' to {artifact}" in vllm_buddy("train", *(f"{k}={v}" for k, v in settings.items()))
    losses = [json.loads(line)["loss"] for line in (artifact / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 4096 // (4 * 64)

    figures, sizes = tmp_path / "eval.json", ("--window", "64", "--context", "16", "--text-tokens", "512")
    named = ("--model", str(model), "--artifact", str(artifact), "--text", str(text), "--json", str(figures))
    vllm_buddy("eval", *named, *sizes, "--budgets", ",".join(map(str, BUDGETS)), "--policy", "buddy")
    rows = json.loads(figures.read_text())
    assert {row["budget"] for row in rows if row["policy"] == "buddy"} == set(BUDGETS)

    buddy = json.dumps({"buddy": {"artifact": str(artifact)}})
    options = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "256", "--kv-cache-memory-bytes", "33554432"]
    arguments = [str(model), "--served-model-name", "tiny", "--additional-config", buddy, *options]
    with ServerProcess(arguments, tmp_path / "server.log", START_TIMEOUT_S) as server:
        server.wait_until_healthy(lambda elapsed, phase: None)
        answers = {budget: ask(server.port, budget) for budget in BUDGETS}

    trained, reference = load_artifact(artifact), load_model(model)
    prompt = load_tokenizer(model)(PROMPT)["input_ids"]
    for budget, (tokens, outcome) in answers.items():
        depth = depth_for_budget(budget, NUM_LAYERS)
        route = RequestRoute(trained.router(), trained.schedule(), depth, prompt)
        assert tokens == generate(reference, route, prompt, NUM_TOKENS, "masked", bypass=trained.bypass).token_ids
        assert (outcome["layers_executed_min"], outcome["layers_executed_max"]) == (depth, depth)


def ask(port: int, budget: float) -> tuple[list[int], dict[str, Any]]:
    """Returns the answer's token ids and what the plugin reports about it."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "return_token_ids": True}
    body |= {"vllm_xargs": {"buddy_budget": budget}}
    response = httpx.post(f"http://{HOST}:{port}/v1/completions", json=body, timeout=120.0, trust_env=False)
    assert response.status_code == 200, response.text
    answer = response.json()
    return answer["choices"][0]["token_ids"], answer["kv_transfer_params"]["buddy"]
