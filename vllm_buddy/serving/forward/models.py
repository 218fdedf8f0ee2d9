"""The routed models: vLLM's own Llama, Qwen2 and Qwen3 with another loop over the layers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm_buddy_kernels import KERNELS, Kernels

from vllm_buddy.artifact import load_artifact
from vllm_buddy.method.bypass import Bypass
from vllm_buddy.serving.forward.compiled import LayerFn, NormFn, bypass_functions, layer_functions, norm_function
from vllm_buddy.serving.forward.eager import RoutedStep
from vllm_buddy.serving.forward.layer import fused_bypasses
from vllm_buddy.serving.graphs.decode import GraphedStep
from vllm_buddy.serving.kv.kv_only import KVOnly, keep_kv_weights
from vllm_buddy.serving.start.hook import SCHEDULER, engine_settings

if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as _CausalLM
    from vllm.model_executor.models.llama import LlamaModel as _Backbone
else:
    _CausalLM = _Backbone = object


class RoutedBackbone(_Backbone):
    """Mixin over vLLM's LlamaModel and Qwen2Model (and Qwen3Model): embed, routed layers, norm."""

    # Not a module of its own: vLLM would look for its weights in the checkpoint.
    buddy_bypass: Bypass | None = None
    # What moves rows between layers that are not compiled one by one; None where they are.
    buddy_kernels: Kernels | None = None
    bypasses: list[Any] | None = None  # of each layer, in the form of a layer
    _functions: list[LayerFn] | None = None
    _last_norm: NormFn | None = None

    def prepare(self) -> None:
        """Make functions of layers, bypasses and norm; once, when the weights are in the form in which they serve."""
        if self._functions is not None:
            return
        bypass, self.buddy_bypass = self.buddy_bypass, None  # what uses it keeps it in the form it wants
        if self.buddy_kernels is not None:
            self._functions, self._last_norm = list(self.layers), self.norm.forward
            self.bypasses = fused_bypasses(bypass, self.buddy_kernels) if bypass else None
            return
        self._functions = layer_functions(list(self.layers), 0, self.vllm_config)
        self._last_norm = norm_function(self.norm, self.vllm_config)
        self.bypasses = bypass_functions(bypass, self.vllm_config) if bypass else None

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        step: RoutedStep | GraphedStep | None = None,
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size]. step None, in profiling and dummy runs: all layers, all rows."""
        self.prepare()
        assert self._functions is not None
        assert self._last_norm is not None
        if isinstance(step, GraphedStep):
            assert input_ids is not None  # prompt embeddings are refused at start
            return step.run(input_ids, positions)
        hidden = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        if step is None:
            for function in self._functions:
                hidden, residual = function(positions, hidden, residual)
        else:
            hidden, residual = step.run(self.layers, self._functions, positions, hidden, residual, self.bypasses)
        assert residual is not None
        hidden, _ = self._last_norm(hidden, residual)
        return hidden


class _Routed(_CausalLM):
    """Mixin over vLLM's ...ForCausalLM."""

    supports_lora = False
    supports_pp = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
            raise RuntimeError(
                f"{type(self).__name__} was loaded without the vllm_buddy scheduler, so nothing would be routed; "
                "start it with --model-impl buddy"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        backbone: Any = self.model
        backbone.__class__ = type(f"Routed{type(backbone).__name__}", (RoutedBackbone, type(backbone)), {})
        backbone.vllm_config = vllm_config
        backbone.do_not_compile = True  # as a whole; see layer_compile
        settings = engine_settings(vllm_config)
        backbone.buddy_kernels = None if settings.kernels is None else KERNELS[settings.kernels]
        self._keeps_kv_weights = settings.kv_policy == KVOnly.name
        assert settings.artifact is not None  # the config hook resolved it to a folder
        artifact = load_artifact(Path(settings.artifact))
        self._lora = artifact.lora
        self._dtype = vllm_config.model_config.dtype
        if artifact.bypass is not None:
            # vLLM builds models with their device as the default one.
            backbone.buddy_bypass = artifact.bypass.to(torch.empty(0, dtype=self._dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        step: RoutedStep | GraphedStep | None = None,
    ) -> torch.Tensor:
        """Hidden states [num_tokens, hidden_size] of a step; see RoutedBackbone."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, step=step)

    @staticmethod
    def get_model_state_cls() -> type:
        """What Model Runner V2 asks a model for."""
        from vllm_buddy.serving.worker.runner_v2 import BuddyModelState

        return BuddyModelState

    def load_weights(self, weights: Any) -> Any:
        """Load as vLLM does, with the artifact's LoRA merged into each weight before vLLM shards and stacks them.

        Afterwards what the KV policy needs is kept, before vLLM packs the weights for its matrix products.
        """
        if self._lora is not None:
            # In the dtype that is served, as merging into a loaded model would.
            weights = self._lora.merge_all((name, weight.to(self._dtype)) for name, weight in weights)
        loaded = super().load_weights(weights)
        if self._keeps_kv_weights:
            for layer in self.model.layers:
                keep_kv_weights(layer)
        return loaded


class BuddyLlamaForCausalLM(_Routed, LlamaForCausalLM):
    """vLLM's LlamaForCausalLM, routed."""


class BuddyQwen2ForCausalLM(_Routed, Qwen2ForCausalLM):
    """vLLM's Qwen2ForCausalLM (Qwen2, Qwen2.5), routed."""


class BuddyQwen3ForCausalLM(_Routed, Qwen3ForCausalLM):
    """vLLM's Qwen3ForCausalLM, routed."""
