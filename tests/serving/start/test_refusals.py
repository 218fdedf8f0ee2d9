"""What cannot be combined with routing: each check by itself, on configurations that only say what checks read."""

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_buddy.errors import UnsupportedError
from vllm_buddy.serving.schedule.draft_pace import DEPTH_DRAFTS
from vllm_buddy.serving.start import refusals
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
        offload_config=SimpleNamespace(
            offload_backend="auto",
            prefetch=SimpleNamespace(offload_group_size=0),
            uva=SimpleNamespace(cpu_offload_gb=0),
        ),
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


def speculation(method: str, model: str | None = None, **changes: Any) -> Any:
    usual = {
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": None,
        "rejection_sample_method": "standard",
    }
    return SimpleNamespace(method=method, model=model, **{**usual, **changes})


NGRAM, DRAFTS = speculation("ngram"), speculation("custom_class", DEPTH_DRAFTS)
DEPTHS = ("custom_class", DEPTH_DRAFTS)

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
    "this method of speculative decoding": [{"speculative_config": speculation("medusa")}],
    "lossless drafts beside tensor parallelism": [
        {"speculative_config": DRAFTS, "parallel_config__tensor_parallel_size": 2}
    ],
    "so many drafts per step": [
        {"speculative_config": speculation("ngram", num_speculative_tokens=129)},
        {"speculative_config": speculation(*DEPTHS, num_speculative_tokens=129)},
    ],
    "numbers of lossless drafts by batch size": [
        {"speculative_config": speculation(*DEPTHS, num_speculative_tokens_per_batch_size=[(1, 99, 1)])}
    ],
    "this rejection sampling of drafts": [
        {"speculative_config": speculation("ngram", rejection_sample_method="synthetic")},
        {"speculative_config": speculation(*DEPTHS, rejection_sample_method="block")},
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
UNADDRESSED = "weights on the CPU without unified addressing"  # asked for on a GPU
RUST = "the Rust front end"  # asked for in the environment
PIPELINE = "asynchronous scheduling of a pipeline"  # refused on a GPU; on a CPU vLLM turns it off
INVARIANT = "VLLM_BATCH_INVARIANT on a GPU"  # the same

# What these features need and routing goes together with.
ALLOWED: list[dict[str, Any]] = [
    {},
    {"speculative_config": NGRAM},
    {"speculative_config": DRAFTS},
    {"speculative_config": speculation("ngram", num_speculative_tokens=128)},
    {"speculative_config": speculation("ngram", num_speculative_tokens_per_batch_size=[(1, 99, 1)])},
    {"speculative_config": speculation("ngram", rejection_sample_method="block")},
    {"offload_config__uva__cpu_offload_gb": 4},
    {"speculative_config": NGRAM, "parallel_config__tensor_parallel_size": 2, "parallel_config__world_size": 2},
    {"parallel_config__pipeline_parallel_size": 2, "parallel_config__distributed_executor_backend": "mp"},
    {"use_v2_model_runner": True},
    {"attention_config__backend": SimpleNamespace(name="FLASH_ATTN")},
    {"scheduler_config__async_scheduling": True},
]


@pytest.fixture(autouse=True)
def without_rust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND", raising=False)
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)


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


def test_pipelines_are_not_scheduled_asynchronously_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a server starts in which a path needs tokens that are still on their way: the engine would end."""
    changes = {"parallel_config__pipeline_parallel_size": 3, "scheduler_config__async_scheduling": True}
    refuse_unsupported(configuration(**changes))
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(refusals.current_platform, "is_cuda", lambda: False)
    assert refused(**changes) == [PIPELINE]


def test_weights_that_vllm_would_move_for_each_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a layer that runs in parts gets weights on the CPU, or unified addressing is refused with it."""
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: False)
    changes = {"offload_config__uva__cpu_offload_gb": 4}
    for available, disabled in ((True, False), (True, True), (False, False)):
        monkeypatch.setattr(refusals, "is_uva_available", lambda available=available: available)
        monkeypatch.setattr(refusals.envs, "VLLM_WEIGHT_OFFLOADING_DISABLE_UVA", disabled, raising=False)
        if available and not disabled:
            refuse_unsupported(configuration(**changes))
        else:
            assert refused(**changes) == [UNADDRESSED]


@pytest.mark.parametrize(("major", "named"), [(8, None), (9, None), (10, None), (10, "FLASH_ATTN")])
def test_the_default_attention_of_blackwell_is_refused_before_weights_are_loaded(
    monkeypatch: pytest.MonkeyPatch, major: int, named: str | None
) -> None:
    """Fails if minutes of loading end with the advice to name a backend, or a GPU is refused that has one."""
    monkeypatch.setattr(refusals.current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(
        refusals.current_platform, "get_device_capability", lambda: SimpleNamespace(major=major), raising=False
    )
    changes = {"attention_config__backend": named and SimpleNamespace(name=named)}
    if major == 10 and named is None:
        assert refused(**changes) == ["the attention backend"]
    else:
        refuse_unsupported(configuration(**changes))


@pytest.mark.parametrize("on_cpu", [True, False], ids=("cpu", "gpu"))
def test_what_a_gpu_cannot_have_is_refused_there_alone(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    """Fails if adapters on a GPU, or results that must not follow the batch, are served by kernels that cannot."""
    monkeypatch.setattr(refusals.current_platform, "is_cpu", lambda: on_cpu)
    monkeypatch.setattr(refusals.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    if on_cpu:
        refuse_unsupported(configuration(lora_config=SET))
    else:
        assert refused(lora_config=SET) == ["LoRA adapters on a GPU", INVARIANT]


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
    assert sorted(name for name, _, _ in _CHECKS) == sorted([*ASKED, UNADDRESSED, RUST, INVARIANT, PIPELINE])
