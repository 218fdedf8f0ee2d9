"""Lists what buddy and its peers can and cannot do, and how each entry is known.

Tokens/s are half of a comparison: systems with different capabilities are not the same thing at different speeds.
"""

from typing import Any, Literal, NamedTuple

Value = Literal["yes", "partly", "no"]
BUDDY, NGRAM, PRUNED, ECONOMIZE = "buddy", "stock, n-gram", "pruned", "economize"


class Known(NamedTuple):
    """One entry. how: "run" by this benchmark, a "test" of this repository, or "read". where: its source."""

    value: Value
    how: Literal["run", "test", "read"]
    where: str


_VLLM = Known("yes", "read", "vLLM 0.32")
_MODULE_LIST = "economize 0.3.2, whose only commands and plugins are for lm-eval and vLLM"

CAPABILITIES: dict[str, dict[str, Known]] = {
    "a depth per request in one batch": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_independence.py"),
        NGRAM: Known("no", "read", "vLLM 0.32: every token runs all layers"),
        PRUNED: Known("no", "read", "the checkpoint has one depth"),
        ECONOMIZE: Known("no", "read", "economize/core/model.py: one layer policy for all rows of a batch"),
    },
    "a depth that is set": {
        BUDDY: Known("yes", "run", "layers executed are counted"),
        NGRAM: Known("no", "read", "vLLM 0.32: every token runs all layers"),
        PRUNED: Known("yes", "run", "pruned"),
        ECONOMIZE: Known("yes", "run", "depth_prune, skipdecode"),
    },
    "layers chosen by the input": {
        BUDDY: Known("yes", "run", "own paths"),
        NGRAM: Known("no", "read", "vLLM 0.32: every token runs all layers"),
        PRUNED: Known("no", "read", "the checkpoint has one path"),
        ECONOMIZE: Known(
            "partly", "read", "economize/techniques/dynamic_depth: calm sets no depth, others need training"
        ),
    },
    "full depth beside reduced depth, exact": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_full_depth.py"),
        NGRAM: Known("no", "read", "there is no reduced depth"),
        PRUNED: Known("no", "read", "the other layers are gone"),
        ECONOMIZE: Known("no", "read", "economize/core/model.py: techniques are the model's, not the request's"),
    },
    "faster without changing the output": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_lossless.py"),
        NGRAM: Known("yes", "run", "tokens are greedy choices of the whole model"),
        PRUNED: Known("no", "run", "its tokens are greedy choices of fewer layers"),
        ECONOMIZE: Known("yes", "run", "lookup, layer_skip"),
    },
    "speculative decoding": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_speculation.py"),
        NGRAM: Known("yes", "run", "n-gram"),
        PRUNED: _VLLM,
        ECONOMIZE: Known("yes", "run", "lookup, layer_skip"),
    },
    "works without training": {
        BUDDY: Known("partly", "read", "README.md: `vllm-buddy prior` needs none; router and repair are trained"),
        NGRAM: Known("yes", "run", "n-gram"),
        PRUNED: Known("yes", "run", "pruned, without repair"),
        ECONOMIZE: Known("partly", "run", "lookup, layer_skip, depth_prune, skipdecode; others need training"),
    },
    "repair of skipped layers": {
        BUDDY: Known("yes", "run", "the artifact's bypass"),
        NGRAM: Known("no", "read", "nothing is skipped"),
        PRUNED: Known("no", "run", "none here; the checkpoint could be trained further"),
        ECONOMIZE: Known("partly", "read", "economize/techniques/dynamic_depth/flexidepth.py: trained adapters"),
    },
    "batches": {
        BUDDY: Known("yes", "run", "batch 8"),
        NGRAM: Known("yes", "run", "batch 8"),
        PRUNED: Known("yes", "run", "batch 8"),
        ECONOMIZE: Known("yes", "run", "batch 8"),
    },
    "continuous batching": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_independence.py"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("no", "read", "economize/decoding/loop.py: rows leave a batch, none joins"),
    },
    "paged KV cache": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_preemption.py"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("no", "read", "economize/runtime/cache.py: a buffer of full length per row"),
    },
    "prefix caching": {
        BUDDY: Known("partly", "test", "tests/serving/schedule/test_prefix_cache.py: within one path"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("no", "read", "economize/decoding/generation.py: a new cache per generation"),
    },
    "HTTP server": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_server.py"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("no", "read", _MODULE_LIST),
    },
    "runs inside vLLM": {
        BUDDY: Known("yes", "run", "vLLM 0.32"),
        NGRAM: Known("yes", "run", "vLLM 0.32"),
        PRUNED: Known("yes", "run", "vLLM 0.32"),
        ECONOMIZE: Known("partly", "read", "economize/backends/vllm: trained jump drafters, tested with vLLM 0.30"),
    },
    "beam search": {
        BUDDY: Known("partly", "read", "README.md: at the server's default budget only"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("no", "read", "economize/integrations/generate.py: refused"),
    },
    "logit_bias and min_p": {
        BUDDY: Known("yes", "run", "the check of outputs uses logit_bias"),
        NGRAM: Known("no", "read", "vllm/sampling_params.py: refused"),
        PRUNED: Known("yes", "run", "the check of outputs uses logit_bias"),
        ECONOMIZE: Known("yes", "read", "economize/integrations/generate.py: transformers' logits processors"),
    },
    "tensor parallelism": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_tensor_parallel.py"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("partly", "read", "economize/distributed/tp.py"),
    },
    "pipeline parallelism": {
        BUDDY: Known("yes", "test", "tests/serving/end_to_end/test_pipeline_parallel.py"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("partly", "read", "economize/arch/base.py: layers on several devices, one after the other"),
    },
    "LoRA adapters per request": {
        BUDDY: Known("partly", "test", "tests/serving/end_to_end/test_adapters.py: on CPU; refused on a GPU"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("no", "read", "economize/core/model.py: techniques are the model's, not the request's"),
    },
    "mixture-of-experts models": {
        BUDDY: Known("no", "read", "vllm_buddy/serving/start/refusals.py: refused at start"),
        NGRAM: _VLLM,
        PRUNED: _VLLM,
        ECONOMIZE: Known("yes", "read", "economize/arch/families"),
    },
    "less memory for weights": {
        BUDDY: Known("partly", "test", "tests/serving/end_to_end/test_max_budget.py: below full depth, by max_budget"),
        NGRAM: Known("no", "read", "vLLM 0.32: every token runs all layers"),
        PRUNED: Known("yes", "run", "pruned"),
        ECONOMIZE: Known("yes", "run", "depth_prune"),
    },
    "less memory for KV": {
        BUDDY: Known("partly", "test", "tests/serving/end_to_end/test_units.py: with kv_layout units"),
        NGRAM: Known("no", "read", "vLLM 0.32: every token runs all layers"),
        PRUNED: Known("yes", "run", "pruned"),
        ECONOMIZE: Known("yes", "run", "depth_prune"),
    },
}

# Techniques of economize that reduce the cost of a token and are not timed, with the reason.
NOT_TIMED = {
    "calm": "a token leaves when it is confident: there is no depth to ask for, so nothing of equal depth to compare",
    "mod": "needs training: its routers start at running everything",
    "gateskip": "needs training: its gates start as constants",
    "flexidepth": "needs training: routers and adapters start untrained",
    "loradrop": "needs training: the correction of a dropped layer starts at zero",
    "jump": "needs training: a drafter",
    "eagle3": "needs training: a drafter",
    "medusa": "needs training: heads",
    "early_exit": "needs training: a readout, or a model trained to exit",
    "draft_model": "needs a smaller model of the same vocabulary; this one is the smallest of its family",
    "prune, quant, lowrank, teal, kivi, kv_evict": "another axis: the depth stays, and vLLM has its own of these",
}


def rows() -> list[dict[str, Any]]:
    """Return a row per capability and system, and one per technique that is not timed."""
    found = [
        {"metric": "can", "variant": system, "capability": capability, **known._asdict()}
        for capability, systems in CAPABILITIES.items()
        for system, known in systems.items()
    ]
    return found + [
        {"metric": "cannot", "variant": f"economize {name}", "reason": reason} for name, reason in NOT_TIMED.items()
    ]
