"""What cannot be combined with routing: each check by itself, on configurations that only say what checks read."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS
from vllm_buddy.serving.start.refusals import _CHECKS, refuse_unsupported


def configuration(**changes: Any) -> Any:
    """A configuration that nothing is wrong with. changes: by section and name, joined by two underscores."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            is_multimodal_model=False,
            is_moe=False,
            enable_prompt_embeds=False,
            hf_text_config=SimpleNamespace(layer_types=["full_attention"] * 2),
            get_sliding_window=lambda: None,
        ),
        attention_config=SimpleNamespace(backend=None),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            tensor_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            world_size=1,
            distributed_executor_backend=None,
            enable_dbo=False,
            worker_cls="auto",
        ),
        cache_config=SimpleNamespace(kv_offloading_size=None, kv_sharing_fast_prefill=False),
        scheduler_config=SimpleNamespace(async_scheduling=None, scheduler_cls=None),
        offload_config=SimpleNamespace(offload_backend="auto", prefetch=SimpleNamespace(offload_group_size=0)),
        lora_config=None,
        speculative_config=None,
        kv_transfer_config=None,
        weight_transfer_config=None,
        ec_transfer_config=None,
        use_v2_model_runner=False,
    )
    for name, value in changes.items():
        *sections, last = name.split("__")
        section: Any = config
        for each in sections:
            section = getattr(section, each)
        assert hasattr(section, last), name
        setattr(section, last, value)
    return config


SET = object()
NGRAM = SimpleNamespace(method="ngram", model=None)
DRAFTS = SimpleNamespace(method="custom_class", model=DEPTH_DRAFTS)

# Ways to ask for each feature, and for no other.
ASKED: dict[str, list[dict[str, Any]]] = {
    "a pooling or encoder model": [
        {"model_config__runner_type": "pooling"},
        {"model_config__is_encoder_decoder": True},
    ],
    "a multimodal model": [{"model_config__is_multimodal_model": True}],
    "a mixture-of-experts model": [{"model_config__is_moe": True}],
    "sliding-window attention": [
        {"model_config__get_sliding_window": lambda: 16},
        {"model_config__hf_text_config": SimpleNamespace(layer_types=["full_attention", "sliding_attention"])},
    ],
    "the attention backend": [{"attention_config__backend": SimpleNamespace(name="FLASHINFER")}],
    "LoRA adapters on a GPU": [{"lora_config": SET, "use_v2_model_runner": True}],
    "LoRA adapters beside speculative decoding": [{"lora_config": SET, "speculative_config": NGRAM}],
    "LoRA adapters beside tensor or pipeline parallelism": [{"lora_config": SET, "parallel_config__world_size": 2}],
    "this method of speculative decoding": [{"speculative_config": SimpleNamespace(method="medusa", model=None)}],
    "lossless drafts beside tensor parallelism": [
        {"speculative_config": DRAFTS, "parallel_config__tensor_parallel_size": 2}
    ],
    "asynchronous scheduling of drafts": [{"speculative_config": NGRAM, "scheduler_config__async_scheduling": True}],
    "a KV connector": [{"kv_transfer_config": SET}],
    "KV offloading": [{"cache_config__kv_offloading_size": 1.0}],
    "prefetching of offloaded weights": [
        {"offload_config__offload_backend": "prefetch"},
        {"offload_config__prefetch__offload_group_size": 2},
    ],
    "weight transfer": [{"weight_transfer_config": SET}],
    "an encoder-cache connector": [{"ec_transfer_config": SET}],
    "drafts beside pipeline parallelism": [{"speculative_config": NGRAM, "parallel_config__pipeline_parallel_size": 2}],
    "pipeline parallelism on Model Runner V2": [
        {"use_v2_model_runner": True, "parallel_config__pipeline_parallel_size": 2}
    ],
    "pipeline parallelism with this executor": [
        {"parallel_config__pipeline_parallel_size": 2, "parallel_config__distributed_executor_backend": "ray"}
    ],
    "context parallelism": [
        {"parallel_config__decode_context_parallel_size": 2},
        {"parallel_config__prefill_context_parallel_size": 2},
    ],
    "dual-batch overlap": [{"parallel_config__enable_dbo": True}],
    "prompt embeddings": [{"model_config__enable_prompt_embeds": True}],
    "KV-sharing fast prefill": [{"cache_config__kv_sharing_fast_prefill": True}],
    "a custom worker": [{"parallel_config__worker_cls": "a.Worker"}],
    "a custom scheduler": [{"scheduler_config__scheduler_cls": "a.Scheduler"}],
}
RUST = "the Rust front end"  # asked for in the environment

# What these features need and routing goes together with.
ALLOWED: list[dict[str, Any]] = [
    {},
    {"speculative_config": NGRAM},
    {"speculative_config": DRAFTS},
    {"speculative_config": NGRAM, "parallel_config__tensor_parallel_size": 2, "parallel_config__world_size": 2},
    {"parallel_config__pipeline_parallel_size": 2, "parallel_config__distributed_executor_backend": "mp"},
    {"use_v2_model_runner": True},
    {"attention_config__backend": SimpleNamespace(name="FLASH_ATTN")},
    {"scheduler_config__async_scheduling": True},
]


@pytest.fixture(autouse=True)
def without_rust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)


def refused(**changes: Any) -> list[str]:
    """The features that a configuration is refused for."""
    with pytest.raises(UnsupportedError) as caught:
        refuse_unsupported(configuration(**changes))
    told = str(caught.value).removeprefix("--model-impl buddy cannot be combined with ")
    return [reason.split(": ")[0] for reason in told.split("; and not with ")]


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_what_goes_together_with_routing_is_not_refused(changes: dict[str, Any]) -> None:
    """Fails if a server is refused for a feature that it does not use, or that was tried."""
    refuse_unsupported(configuration(**changes))


@pytest.mark.parametrize(("name", "changes"), [(name, each) for name, ways in ASKED.items() for each in ways])
def test_each_feature_is_refused_by_its_name(name: str, changes: dict[str, Any]) -> None:
    """Fails if a feature that breaks routing starts, or is refused as another."""
    assert refused(**changes) == [name]


def test_all_reasons_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if an operator has to start once for each feature, or the front end that checks no budget starts."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    assert refused(model_config__is_moe=True, kv_transfer_config=SET) == [
        "a mixture-of-experts model",
        "a KV connector",
        RUST,
    ]


def test_every_refusal_is_tried_here() -> None:
    """Fails if a feature is added that no test refuses, or one that a test refuses is no longer."""
    assert sorted(name for name, _, _ in _CHECKS) == sorted([*ASKED, RUST])
