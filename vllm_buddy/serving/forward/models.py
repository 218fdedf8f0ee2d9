"""The routed models: vLLM's own Llama, Mistral, Qwen2 and Qwen3 with another loop over the layers."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.sequence import IntermediateTensors
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm_buddy_kernels import KERNELS, Kernels

from vllm_buddy.method.bypass import Bypass
from vllm_buddy.method.kv_policy import KV_ONLY
from vllm_buddy.serving.compat import with_layers
from vllm_buddy.serving.forward.auxiliary import AuxiliaryStates, ModelOutput
from vllm_buddy.serving.forward.bypasses import bypass_functions, kv_bypass_functions
from vllm_buddy.serving.forward.compiled import LayerFn, NormFn, layer_functions, norm_function
from vllm_buddy.serving.forward.layer import fused_bypasses
from vllm_buddy.serving.forward.pipeline import hand_on, is_here, stage_of, states_of, with_counts
from vllm_buddy.serving.kv.kv_only import keep_kv_weights, keep_missing_kv_weights
from vllm_buddy.serving.schedule import SCHEDULER
from vllm_buddy.serving.start.agreement import load_agreed_artifact
from vllm_buddy.serving.start.attached import limits_of
from vllm_buddy.serving.start.settings import engine_settings

# By name: it builds on the forward pass, so an import here would go the wrong way.
_MODEL_STATE = "vllm_buddy.serving.worker.runner_v2.BuddyModelState"

if TYPE_CHECKING:
    from vllm.model_executor.models.llama import LlamaForCausalLM as _CausalLM
    from vllm.model_executor.models.llama import LlamaModel as _Backbone
else:
    _CausalLM = _Backbone = object


class Step(Protocol):
    """One step of the engine, as the worker hands it to the model: RoutedStep or GraphedStep."""

    def forward(
        self,
        backbone: "RoutedBackbone",
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        intermediate_tensors: IntermediateTensors | None,
    ) -> ModelOutput:
        """The output of the model: hidden states [num_tokens, hidden_size] after the last norm, see ModelOutput."""


class RoutedBackbone(_Backbone):
    """Mixin over vLLM's LlamaModel (and MistralModel) and Qwen2Model (and Qwen3Model): embed, routed layers, norm."""

    # Not a torch module: vLLM would look for its weights in the checkpoint.
    buddy_bypass: Bypass | None = None
    buddy_writes_kv = False  # whether skipped rows write K and V, as under `kv_only`
    # What moves rows where layers are not compiled one by one; None where they are.
    buddy_kernels: Kernels | None = None
    # Of the layers of this pipeline stage, one each; without pipeline parallelism, of all layers of the model. Layers
    # that are not loaded (the setting max_budget) have a bypass, but no function.
    stage: list[Any]
    attention_names: list[str]  # by which vLLM's forward context knows the attention of each layer
    functions: list[LayerFn | None]
    bypasses: list[Any] | None = None  # called like layers
    last_norm: NormFn  # of the last stage

    def prepare(self) -> None:
        """Make the functions of layers, bypasses and norm. Called once, when the weights have their final form."""
        bypass, self.buddy_bypass = self.buddy_bypass, None  # the functions keep it in the form that they need
        here = stage_of(len(self.layers))
        self.stage = list(self.layers)[here]
        self.attention_names = [layer.self_attn.attn.layer_name if is_here(layer) else "" for layer in self.stage]
        if self.buddy_writes_kv:
            keep_missing_kv_weights(filter(is_here, self.stage))
        bypasses: list[Any] | None = None
        if self.buddy_kernels is not None:
            self.functions = [layer if is_here(layer) else None for layer in self.stage]
            self.last_norm = self.norm.forward
            bypasses = fused_bypasses(bypass, self.buddy_kernels) if bypass else None
        else:
            self.functions = layer_functions(self.stage, self.vllm_config, with_residual=here.start > 0)
            if get_pp_group().is_last_rank:
                self.last_norm = norm_function(self.norm, self.vllm_config)
            if bypass is not None:
                if self.buddy_writes_kv:
                    bypasses = kv_bypass_functions(list(self.layers), bypass, self.vllm_config)
                if bypasses is None or None in bypasses[here]:
                    plain = bypass_functions(bypass, self.vllm_config)
                    bypasses = plain if bypasses is None else [own or other for own, other in zip(bypasses, plain)]
        self.bypasses = bypasses and bypasses[here]

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        step: Step | None = None,
    ) -> ModelOutput:
        """Hidden states [num_tokens, hidden_size], or what the next stage gets.

        step None, in profiling and dummy runs: all layers that are loaded, all rows.
        """
        if step is not None:
            return step.forward(self, input_ids, positions, inputs_embeds, intermediate_tensors)
        hidden, residual = self.enter(input_ids, inputs_embeds, intermediate_tensors)
        auxiliary = AuxiliaryStates(self.aux_hidden_state_layers)
        for index, function in enumerate(self.functions):
            auxiliary.pass_by(index, hidden, residual)
            if function is not None:
                hidden, residual = function(positions, hidden, residual)
        auxiliary.pass_by(len(self.functions), hidden, residual)
        return self.leave(hidden, residual, auxiliary)

    def enter(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        intermediate_tensors: IntermediateTensors | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states and residual before the first layer of this stage, each [num_tokens, hidden_size]."""
        if intermediate_tensors is not None:
            return states_of(intermediate_tensors)
        return self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds, None

    def leave(
        self,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        auxiliary: AuxiliaryStates,
        executed: torch.Tensor | None = None,
    ) -> ModelOutput:
        """What the model returns after the last layer of this stage. executed: see hand_on."""
        if not get_pp_group().is_last_rank:
            return hand_on(hidden, residual, executed)
        assert residual is not None  # the last layer runs for all rows
        return auxiliary.beside(self.last_norm(hidden, residual)[0])


class _Routed(_CausalLM):
    """Mixin over vLLM's ...ForCausalLM."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **kwargs: Any) -> None:
        if vllm_config.scheduler_config.scheduler_cls != SCHEDULER:
            raise RuntimeError(
                f"{type(self).__name__} was loaded without the vllm_buddy scheduler, so nothing would be routed; "
                "start it with --model-impl buddy"
            )
        artifact = load_agreed_artifact(vllm_config)
        with with_layers(limits_of(vllm_config.model_config).layers):
            super().__init__(vllm_config=vllm_config, prefix=prefix, **kwargs)
        backbone: Any = self.model
        backbone.__class__ = type(f"Routed{type(backbone).__name__}", (RoutedBackbone, type(backbone)), {})
        backbone.vllm_config = vllm_config
        backbone.do_not_compile = True  # not as a whole; see compiled.py
        self.make_empty_intermediate_tensors = with_counts(backbone.make_empty_intermediate_tensors)
        settings = engine_settings(vllm_config)
        backbone.buddy_kernels = None if settings.kernels is None else KERNELS[settings.kernels]
        backbone.buddy_writes_kv = settings.kv == KV_ONLY
        self._lora = artifact.lora
        self._dtype = vllm_config.model_config.dtype
        if artifact.bypass is not None:
            # vLLM builds models with their device as the default device.
            backbone.buddy_bypass = artifact.bypass.to(torch.empty(0, dtype=self._dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        step: Step | None = None,
    ) -> ModelOutput:
        """Hidden states [num_tokens, hidden_size] of a step; see RoutedBackbone."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds, step=step)

    @staticmethod
    def get_model_state_cls() -> type:
        """The ModelState of this model, which Model Runner V2 asks for."""
        return resolve_obj_by_qualname(_MODEL_STATE)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Load as vLLM does, with the artifact's LoRA merged into each weight before vLLM shards and stacks it.

        Afterwards the KV policy's own copies are made, before vLLM packs the weights for its matrix products.
        """
        if self._lora is not None:
            # In the dtype that is served, as if merged into a loaded model.
            weights = self._lora.merge_all((name, weight.to(self._dtype)) for name, weight in weights)
        loaded = super().load_weights(weights)
        self._lora = None  # weights are loaded once
        if self.model.buddy_writes_kv:
            for layer in filter(is_here, self.model.layers):
                keep_kv_weights(layer)
        return loaded


class BuddyLlamaForCausalLM(_Routed, LlamaForCausalLM):
    """vLLM's LlamaForCausalLM, routed."""


class BuddyMistralForCausalLM(_Routed, MistralForCausalLM):
    """vLLM's MistralForCausalLM, routed."""


class BuddyQwen2ForCausalLM(_Routed, Qwen2ForCausalLM):
    """vLLM's Qwen2ForCausalLM (Qwen2, Qwen2.5), routed."""


class BuddyQwen3ForCausalLM(_Routed, Qwen3ForCausalLM):
    """vLLM's Qwen3ForCausalLM, routed."""
