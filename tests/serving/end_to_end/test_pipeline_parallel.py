"""Pipeline stages give the reference's tokens, log-probabilities and counts of executed layers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.harness.batches import batch, batch_to_preempt
from tests.harness.engine import BLOCK_SIZE, Ask, Tiny
from vllm_buddy.method import PathSchedule

# Log-probabilities of float32 models, whose sums the reference and vLLM's kernels take in another order.
TOLERANCE = 2e-3
FEW_BLOCKS = 17

# The scheduler runs in the script's process, so that it can count preemptions; the stages in two others.
_SERVE = """
import json, os, sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    model, settings, options, batches = json.load(sys.stdin)
    llm = LLM(
        model, model_impl="buddy", dtype="float32", skip_tokenizer_init=True, max_model_len=512, max_num_seqs=16,
        kv_cache_memory_bytes=32 << 20, distributed_executor_backend="mp", additional_config={"buddy": settings},
        **options,
    )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []

    def counted(request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    for asks in batches:
        params = [
            SamplingParams(temperature=0, max_tokens=n, logprobs=0, detokenize=False, extra_args={"buddy_budget": b})
            for _, b, n in asks
        ]
        outputs = llm.generate([{"prompt_token_ids": p} for p, _, _ in asks], params, use_tqdm=False)
        answers = [
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [next(iter(token.values())).logprob for token in output.outputs[0].logprobs],
                "outcome": output.kv_transfer_params["buddy"],
            }
            for output in outputs
        ]
        print("ANSWERS " + json.dumps([len(preempted), answers]))
        preempted.clear()
"""


def serve(
    llama: Tiny, script: Path, batches: list[list[Ask]], *, settings: dict[str, Any], **options: Any
) -> list[tuple[int, list[dict[str, Any]]]]:
    """For each batch the number of preemptions and the answers."""
    script.write_text(_SERVE)
    wanted = [[(a.prompt, a.budget, a.max_tokens) for a in asks] for asks in batches]
    settings = {"artifact": str(llama.artifact_folder), "paths": "free", "route_every": 4, **settings}
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([str(llama.folder), settings, options, wanted]),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "compiled one by one" not in done.stdout + done.stderr
    return [json.loads(line.removeprefix("ANSWERS ")) for line in done.stdout.splitlines() if line[:8] == "ANSWERS "]


def check(llama: Tiny, asks: list[Ask], answers: list[dict[str, Any]], policy: str, *, library: bool = False) -> None:
    """Fail unless the answers are the reference's."""
    for ask, answer in zip(asks, answers, strict=True):
        expected = llama.expected(ask, policy, PathSchedule(4), library=library)
        assert answer["tokens"] == expected.token_ids
        assert answer["logprobs"] == pytest.approx(expected.logprobs, abs=TOLERANCE)
        depths = [path.bit_count() for path in expected.paths]
        outcome = answer["outcome"]
        assert (outcome["layers_executed_min"], outcome["layers_executed_max"]) == (min(depths), max(depths))
        assert outcome["distinct_paths"] == len(set(expected.paths))
        if outcome["tokens"] == len(depths):  # tokens that are computed again are counted again
            assert outcome["layers_executed_mean"] == pytest.approx(sum(depths) / len(depths))


def crowd() -> list[Ask]:
    """Requests that do not fit into FEW_BLOCKS together, so that vLLM preempts some of them."""
    return [Ask(ask.prompt, ask.budget, 72) for ask in batch_to_preempt(seed=22)]


@pytest.mark.parametrize(
    ("eager", "settings"),
    [
        (True, {"kv_policy": "masked"}),
        pytest.param(True, {"kv_policy": "masked", "kernels": "reference"}, marks=pytest.mark.slow),
        pytest.param(False, {"kv_policy": "kv_only"}, marks=pytest.mark.slow),
    ],
    ids=("eager", "kernels", "compiled"),
)
def test_two_stages_give_the_reference_answers(
    tiny: Callable[[str], Tiny], tmp_path: Path, eager: bool, settings: dict[str, Any]
) -> None:
    """Fails if a stage runs other rows than the plan says, loses a residual or a count, or mixes two steps up."""
    llama, batches = tiny("llama"), [batch(seed=11), crowd()]
    served = serve(
        llama,
        tmp_path / "serve.py",
        batches,
        settings=settings,
        pipeline_parallel_size=2,
        enforce_eager=eager,
        max_num_batched_tokens=48,  # prompts in chunks, several of which are on their way at once
        block_size=BLOCK_SIZE,
        num_gpu_blocks_override=FEW_BLOCKS,
    )
    for asks, (_, answers) in zip(batches, served, strict=True):
        check(llama, asks, answers, settings["kv_policy"])
    assert served[1][0] > 0, "nothing was preempted"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["masked", "kv_only"])
def test_rows_that_skip_a_whole_stage_pass_through_its_bypasses(
    tiny: Callable[[str], Tiny], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """Fails if a stage of which no layer runs, for some rows or for all of a step, drops or changes their state."""
    llama, middle = tiny("llama"), 0b00011000
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,2,3")
    asks = batch(seed=7)
    paths = [set(llama.expected(ask, policy, PathSchedule(4)).paths) for ask in asks]
    skipping = [number for number, found in enumerate(paths) if any(path & middle == 0 for path in found)]
    assert skipping, "every row runs a layer of the stage"
    batches = [asks, [asks[skipping[0]]]]
    served = serve(
        llama,
        tmp_path / "serve.py",
        batches,
        settings={"kv_policy": policy},
        pipeline_parallel_size=3,
        enforce_eager=True,
    )
    for asked, (_, answers) in zip(batches, served, strict=True):
        check(llama, asked, answers, policy)


@pytest.mark.slow
def test_stages_of_two_ranks_give_the_reference_answers(tiny: Callable[[str], Tiny], tmp_path: Path) -> None:
    """Fails if the counts, which vLLM hands on in parts to the ranks of the next stage, arrive in pieces."""
    llama, asks = tiny("llama"), batch(seed=12)
    ((_, answers),) = serve(
        llama,
        tmp_path / "serve.py",
        [asks],
        settings={"kv_policy": "masked"},
        pipeline_parallel_size=2,
        tensor_parallel_size=2,
        enforce_eager=True,
    )
    check(llama, asks, answers, "masked")
