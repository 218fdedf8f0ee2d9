"""Two tensor-parallel ranks get the same plan and give the reference's tokens."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.batches import batch
from tests.harness.engine import Tiny
from vllm_buddy.method import PathSchedule

_SERVE = """
import json, sys

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    model, artifact, asks, eager, layout = json.load(sys.stdin)
    llm = LLM(
        model, model_impl="buddy", dtype="float32", skip_tokenizer_init=True, enforce_eager=eager, max_model_len=512,
        kv_cache_memory_bytes=32 << 20, tensor_parallel_size=2, distributed_executor_backend="mp",
        additional_config={
            "buddy": {"artifact": artifact, "paths": "free", "route_every": 4, "kv_layout": layout},
        },
    )
    params = [
        SamplingParams(temperature=0, max_tokens=n, detokenize=False, extra_args={"buddy_budget": b})
        for _, b, n in asks
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p, _, _ in asks], params, use_tqdm=False)
    print("TOKENS " + json.dumps([list(o.outputs[0].token_ids) for o in outputs]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("eager", "layout"), [(True, "dense"), (False, "dense"), (True, "units")], ids=("eager", "compiled", "units")
)
def test_two_ranks_give_the_reference_tokens(
    tiny: Callable[[str], Tiny], tmp_path: Path, eager: bool, layout: str
) -> None:
    """Fails if ranks run different rows of a layer, read sharded heads as whole ones, or disagree on compiled code or
    on where a layer lies."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two ranks need two cores")
    llama = tiny("llama")
    asks = batch(seed=11)
    script = tmp_path / "serve.py"
    script.write_text(_SERVE)
    wanted = [(a.prompt, a.budget, a.max_tokens) for a in asks]
    request = [str(llama.folder), str(llama.artifact_folder), wanted, eager, layout]
    env = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(request), env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = json.loads(next(li for li in done.stdout.splitlines() if li.startswith("TOKENS ")).removeprefix("TOKENS "))
    assert "compiled one by one" not in done.stdout + done.stderr
    assert tokens == [llama.expected(ask, "masked", PathSchedule(4)).token_ids for ask in asks]
