"""Draws random model weights that tell layers apart, in place of vLLM's dummy weights.

vLLM's dummy weights are equal in every layer, and so small that no layer changes a bfloat16 state: an engine that ran
the wrong layers would give the right logits. The weights here are drawn from a seed per tensor and are so large that
every layer changes the state. A model with some of the layers of another model has the weights of those layers.
"""

import re
import zlib
from collections.abc import Sequence

import torch
from torch import nn

_LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
_EMBEDDING_STD = 1.0
_LM_HEAD_GAIN = 4.0  # standard deviation of the logits: the likeliest tokens are then about 0.1 nats apart
_MATRIX_GAIN = 1.0
_BIAS_STD = 0.1
_NORM_STD = 0.1  # around 1


def load_drawn_weights(layers: Sequence[int]) -> None:
    """Make load_format "dummy" draw weights in this process from now on.

    layers: for each layer of the models to be loaded, its number in the whole model.
    """
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    class DrawnWeights(DummyModelLoader):
        def load_weights(self, model: nn.Module, model_config: object) -> None:  # noqa: ARG002 - vLLM's signature
            draw_weights(model, layers)

    register_model_loader("dummy")(DrawnWeights)


@torch.no_grad()
def draw_weights(model: nn.Module, layers: Sequence[int]) -> None:
    """Draw all parameters of a model, on the device that holds them."""
    for name, weight in model.named_parameters():
        whole_name = _LAYER.sub(lambda found: str(layers[int(found[0])]), name)
        generator = torch.Generator(device=weight.device).manual_seed(zlib.crc32(whole_name.encode()))
        mean, std = _distribution(name, weight)
        weight.normal_(mean, std, generator=generator)


def _distribution(name: str, weight: torch.Tensor) -> tuple[float, float]:
    """Return the mean and standard deviation of a parameter."""
    if "norm" in name:
        return 1.0, _NORM_STD
    if weight.ndim == 1:
        return 0.0, _BIAS_STD
    if "embed_tokens" in name:
        return 0.0, _EMBEDDING_STD
    return 0.0, (_LM_HEAD_GAIN if "lm_head" in name else _MATRIX_GAIN) / weight.shape[1] ** 0.5
