"""The check of `vllm-buddy doctor` that routes two requests through a real engine with a tiny random model.

The check starts `python -m vllm_buddy.cli.doctor_engine FOLDER` as a process, so that an engine that crashes does not
end the report.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_buddy.cli.doctor_checks import Check
from vllm_buddy.method import depth_for_budget
from vllm_buddy.serving.admission.option_names import BUDGET_KEY, OUTCOME_KEY

_TIMEOUT_S = 240
_MARK = "doctor-engine:"
_NUM_LAYERS = 6
_HIDDEN_SIZE = 128
_HEAD_DIM = 32  # the smallest that vLLM's CPU attention supports
_VOCAB_SIZE = 256
_BUDGETS = (1.0, 0.5)
_NUM_TOKENS = 8
_TAIL_LINES = 12


def check_engine() -> Check:
    """Check that a tiny Llama runs exactly as many layers as the budgets of two requests allow."""
    with tempfile.TemporaryDirectory(prefix="vllm_buddy-doctor-") as folder:
        command = [sys.executable, "-m", "vllm_buddy.cli.doctor_engine", folder]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Check(
                "engine",
                False,
                f"a tiny model was not served within {_TIMEOUT_S} s",
                "check whether the machine is busy with other work",
            )
        finally:
            # This also ends processes that a failed engine leaves behind.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return judge(output, process.returncode)


def judge(output: str, status: int) -> Check:
    """Return the result of the check, given the output and exit status of the engine's process."""
    marked = [line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK)]
    advice = "repair the checks above first; if all of them pass, report this output as an issue"
    if status != 0 or not marked:
        tail = "\n".join(output.strip().splitlines()[-_TAIL_LINES:])
        return Check("engine", False, f"a tiny model could not be served (status {status})\n{tail}", advice)
    outcomes = json.loads(marked[-1])
    for budget, outcome in zip(_BUDGETS, outcomes):
        depth = depth_for_budget(budget, _NUM_LAYERS)
        if outcome is None:
            advice = "the stock model was served because the plugin was not loaded; see the check of the plugin above"
            return Check("engine", False, f"budget {budget:g}: the answer has no layer counts", advice)
        counted = (outcome["layers_executed_min"], outcome["layers_executed_max"])
        if counted != (depth, depth):
            found = f"budget {budget:g}: {counted[0]} to {counted[1]} layers ran per token, expected {depth}"
            return Check("engine", False, found, advice)
    depths = " and ".join(str(depth_for_budget(b, _NUM_LAYERS)) for b in _BUDGETS)
    return Check("engine", True, f"a tiny Llama ran {depths} of {_NUM_LAYERS} layers per token, as requested")


def write_tiny_model(folder: Path) -> None:
    """Write a random Llama to `folder`, and an artifact for it to `folder`/artifact."""
    import numpy as np
    from transformers import LlamaConfig, LlamaForCausalLM

    from vllm_buddy.artifact import Artifact
    from vllm_buddy.artifact.config import FORMAT_VERSION, BuddyConfig, PriorConfig
    from vllm_buddy.artifact.fingerprint import identify

    config = LlamaConfig(
        num_hidden_layers=_NUM_LAYERS,
        hidden_size=_HIDDEN_SIZE,
        intermediate_size=2 * _HIDDEN_SIZE,
        num_attention_heads=_HIDDEN_SIZE // _HEAD_DIM,
        num_key_value_heads=2,
        head_dim=_HEAD_DIM,
        vocab_size=_VOCAB_SIZE,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    buddy_config = BuddyConfig(
        format_version=FORMAT_VERSION,
        name="doctor",
        base_model=identify(folder),
        prior=PriorConfig(indicator="taylor", calibration="none, drawn at random", num_tokens=0),
        has_decision_module=False,
    )
    prior = np.random.default_rng(0).standard_normal(_NUM_LAYERS - 2).astype(np.float32)
    Artifact(buddy_config, prior).save(folder / "artifact")


def route_two_requests(folder: Path) -> list[object]:
    """Send one request per budget, all together; returns what the plugin reports about each."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        model_impl="buddy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=256,
        kv_cache_memory_bytes=64 << 20,
        additional_config={"buddy": {"artifact": str(folder / "artifact")}},
    )
    prompts = [{"prompt_token_ids": [3 + i, 7, 11, 19, 23]} for i in range(len(_BUDGETS))]
    parameters = [
        SamplingParams(
            max_tokens=_NUM_TOKENS, ignore_eos=True, temperature=0, detokenize=False, extra_args={BUDGET_KEY: b}
        )
        for b in _BUDGETS
    ]
    answers = llm.generate(prompts, parameters, use_tqdm=False)
    return [(answer.kv_transfer_params or {}).get(OUTCOME_KEY) for answer in answers]


if __name__ == "__main__":
    target = Path(sys.argv[1])
    write_tiny_model(target)
    print(_MARK + json.dumps(route_two_requests(target)), flush=True)
