"""All changes to vLLM's code: four wrapped functions, and a table entry for each routed model class.

`_ModelRegistry._normalize_arch` maps an architecture to its routed class, or refuses it.
    Why: `--model-impl` accepts any string, but the registry knows a fixed list of implementations.
    Nearest hook: `--model-class-overrides`, which does not look at `--model-impl` and calls no config hook.
    Remove when: ModelRegistry can register an implementation for a value of `--model-impl`.

`SamplingParams.verify` validates the options that a request sends in `vllm_xargs`.
    Why: vLLM does not know them, and only an error raised here becomes HTTP 400.
    Nearest hook: `SamplingParams._verify_extra_args`, which checks the range of integers only.
    Remove when: plugins can register a validator of `extra_args`.

`InputProcessor.process_inputs` validates the options that depend on the prompt.
    Why, nearest hook: as above; `SamplingParams.verify` does not get the prompt.
    Remove when: that validator gets the tokenized prompt.

`get_kv_cache_groups` makes one KV-cache group for each KV unit.
    Why: vLLM groups layers by the kind of their caches, and those of one model are alike.
    Nearest hook: a KVCacheSpec of our own per unit, which vLLM would take for several kinds of attention.
    Remove when: a model class can name the groups (`SupportsKVCacheGrouping`, from vLLM 0.33 on).

All act only where model_impl is "buddy", and applying them again changes nothing. tests/serving/test_patches.py fails
when vLLM's side moves.
"""

from typing import Any

MODEL_IMPL = "buddy"

# vLLM's architecture name -> our class, as registered below.
ROUTED_ARCHITECTURES = {
    "LlamaForCausalLM": "BuddyLlamaForCausalLM",
    "Qwen2ForCausalLM": "BuddyQwen2ForCausalLM",
    "Qwen3ForCausalLM": "BuddyQwen3ForCausalLM",
}
_MODELS_MODULE = "vllm_buddy.serving.forward.models"
_MARK = "_vllm_buddy_original"


def apply() -> None:
    """Register the routed models and apply the patches. Calling it again changes nothing."""
    _register_models()
    _wrap_normalize_arch()
    _wrap_verify()
    _wrap_process_inputs()
    _wrap_get_kv_cache_groups()


def _register_models() -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_buddy.serving.start.hook import BuddyModelConfig

    for routed in ROUTED_ARCHITECTURES.values():
        # As a string, so that vLLM imports the model code only in the processes that need it.
        if routed not in ModelRegistry.models:
            ModelRegistry.register_model(routed, f"{_MODELS_MODULE}:{routed}")
        MODELS_CONFIG_MAP[routed] = BuddyModelConfig


def _wrap_normalize_arch() -> None:
    """Map a supported architecture to its routed class, and refuse the others by name."""
    from vllm.model_executor.models.registry import _ModelRegistry

    original = _ModelRegistry._normalize_arch
    if hasattr(original, _MARK):
        return

    def normalize_arch(self: Any, architecture: str, model_config: Any) -> str:
        if getattr(model_config, "model_impl", None) != MODEL_IMPL:
            return original(self, architecture, model_config)
        if architecture not in ROUTED_ARCHITECTURES:
            raise ValueError(
                f"--model-impl buddy does not support the architecture {architecture!r}; "
                f"supported are {', '.join(ROUTED_ARCHITECTURES)}"
            )
        return ROUTED_ARCHITECTURES[architecture]

    setattr(normalize_arch, _MARK, original)
    _ModelRegistry._normalize_arch = normalize_arch


def _wrap_verify() -> None:
    """Validate a request's buddy options where vLLM validates its own: HTTP 400 in the server."""
    from vllm.sampling_params import SamplingParams

    from vllm_buddy.serving.admission.options import verify_options

    original = SamplingParams.verify
    if hasattr(original, _MARK):
        return

    def verify(self: SamplingParams, model_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, model_config, *args, **kwargs)
        if getattr(model_config, "model_impl", None) == MODEL_IMPL:
            verify_options(self, model_config)

    setattr(verify, _MARK, original)
    SamplingParams.verify = verify


def _wrap_process_inputs() -> None:
    """Validate what depends on the prompt, where vLLM has tokenized it and the request has not left for the engine."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_buddy.serving.admission.options import verify_with_prompt

    original = InputProcessor.process_inputs
    if hasattr(original, _MARK):
        return

    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        params = request.sampling_params
        if getattr(self.model_config, "model_impl", None) == MODEL_IMPL and isinstance(params, SamplingParams):
            verify_with_prompt(
                params,
                len(request.prompt_token_ids),
                is_streaming_input=request.resumable,
                full_prompt=self.model_config.buddy_limits.full_prompt(params.extra_args),
            )
        return request

    setattr(process_inputs, _MARK, original)
    InputProcessor.process_inputs = process_inputs


def _wrap_get_kv_cache_groups() -> None:
    """Give each KV unit a group, where the config hook chose units. vLLM imports the function late in other modules."""
    from vllm.v1.core import kv_cache_utils

    from vllm_buddy.serving.compat import groups_by_units

    original = kv_cache_utils.get_kv_cache_groups
    if hasattr(original, _MARK):
        return

    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: Any) -> Any:
        groups = original(vllm_config, kv_cache_spec)
        units = getattr(vllm_config.model_config, "buddy_kv_units", None)
        return groups if units is None else groups_by_units(groups, units)

    setattr(get_kv_cache_groups, _MARK, original)
    kv_cache_utils.get_kv_cache_groups = get_kv_cache_groups
