"""Measures what the setting `max_budget` saves: memory of weights, and the KV cache that takes its place.

    python -m benchmarks.speed.max_budget        # SmolLM2-135M and its shipped artifact, CPU, about 3 minutes

Each server starts in its own process, with weights in bf16 and a KV cache of the same size in bytes. `weights_mib` are
the weights that vLLM loads; `kv_tokens_per_gib` is what its KV cache holds; `kv_tokens` what it would hold if weights
and KV cache had 1 GiB together. Servers with max_budget must give the tokens of the server without it, at budgets that
both allow; otherwise nothing is written.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness.result_rows import RESULTS_DIR, device, environment, write_rows
from vllm_buddy.models.embedded import fetch

MAX_BUDGETS = (1.0, 0.75, 0.5)
KV_BYTES = TOTAL_BYTES = 1 << 30
PROMPTS = [list(range(100 + i, 164 + i)) for i in range(8)]
NUM_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.max_budget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / f"{device()}_max_budget.jsonl")
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.child, args.model)))
        return
    env = environment()
    model, found = fetch(report=print), {}
    for max_budget in MAX_BUDGETS:
        command = [sys.executable, "-m", "benchmarks.speed.max_budget", "--child", str(max_budget), "--model", model]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
        found[max_budget] = json.loads(done.stdout.splitlines()[-1])
    check_tokens({max_budget: one["token_ids"] for max_budget, one in found.items()})
    rows = [
        {"metric": metric, "max_budget": max_budget, "layers": one["layers"], "value": value}
        for max_budget, one in found.items()
        for metric, value in figures(one["weights_bytes"], one["kv_tokens"]).items()
    ]
    write_rows(args.out, rows, env)
    for row in rows:
        print(f"max_budget {row['max_budget']:<5} {row['layers']:3} layers  {row['metric']:18} {row['value']:12,.1f}")


def figures(weights_bytes: int, tokens_per_gib: int) -> dict[str, float]:
    """The figures of one server, by metric. tokens_per_gib: in a KV cache of KV_BYTES."""
    return {
        "weights_mib": round(weights_bytes / 2**20, 1),
        "kv_tokens_per_gib": tokens_per_gib,
        "kv_tokens": int(tokens_per_gib * (TOTAL_BYTES - weights_bytes) / KV_BYTES),
    }


def check_tokens(tokens: dict[float, dict[str, list[list[int]]]]) -> None:
    """Exit with status 1 unless all servers gave the same tokens. tokens: by max_budget, then by the request's budget.

    The same code computes the same numbers on the same path, whatever other layers there are.
    """
    whole = tokens[1.0]
    for max_budget, by_budget in tokens.items():
        for budget, found in by_budget.items():
            if found != whole[budget]:
                raise SystemExit(f"max_budget {max_budget:g} gives other tokens at budget {budget}; nothing is written")


def measure(max_budget: float, model: str) -> dict[str, Any]:
    """Start one engine in this process and return layers and bytes of its weights, KV tokens and generated tokens."""
    from vllm import LLM, SamplingParams

    from benchmarks.harness import engines  # before vLLM: engines in this process
    from vllm_buddy.serving.forward.models import BuddyLlamaForCausalLM

    loaded: list[int] = []
    load_weights = BuddyLlamaForCausalLM.load_weights

    def count_weights(self: Any, weights: Any) -> Any:
        # Before vLLM packs them for its matrix products on CPU.
        loaded.append(sum(weight.numel() * weight.element_size() for weight in self.parameters()))
        return load_weights(self, weights)

    BuddyLlamaForCausalLM.load_weights = count_weights  # type: ignore[method-assign]
    llm = LLM(
        model,
        model_impl="buddy",
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=16,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_BYTES,
        skip_tokenizer_init=True,
        additional_config={"buddy": {"max_budget": max_budget}},
    )
    tokens = {}
    for budget in (b for b in MAX_BUDGETS if b <= max_budget):
        params = SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, extra_args={"buddy_budget": budget}
        )
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
        tokens[str(budget)] = [list(output.outputs[0].token_ids) for output in outputs]
    config = engines.core(llm).vllm_config
    (weights_bytes,) = loaded
    return {
        "layers": config.model_config.buddy_limits.layers.bit_count(),
        "weights_bytes": weights_bytes,
        "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "token_ids": tokens,
    }


if __name__ == "__main__":
    main()
