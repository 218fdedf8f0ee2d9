"""What a draft pass says: the likeliest token, of all or of those that the artifact's drafts choose among."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_buddy.errors import SettingsError

Likeliest = Callable[[torch.Tensor], torch.Tensor]  # [num_tokens, hidden_size], after the last norm, to [num_tokens]


def likeliest_of(model: Any, vocabulary: np.ndarray | None) -> Likeliest:
    """Return the function from states to tokens; its head is a layer of its own where it has some tokens only.

    model: vLLM's, with its weights. vocabulary: [n], ascending; None: all tokens. The layer takes n * hidden_size
    weights more.

    Raises:
        SettingsError: the model's head is quantised, so that there are no rows to take.
    """
    if vocabulary is None:
        return lambda hidden: model.compute_logits(hidden).argmax(dim=-1)
    if not isinstance(model.lm_head.quant_method, UnquantizedEmbeddingMethod):
        raise SettingsError(
            "drafts of this artifact read the frequent tokens' rows of the head, and the model's head is quantised; "
            "serve with drafts.vocabulary: all"
        )
    weight = model.lm_head.weight.detach()
    tokens = torch.from_numpy(vocabulary).to(weight.device)
    layer = ReplicatedLinear(weight.shape[1], len(tokens), bias=False, params_dtype=weight.dtype).to(weight.device)
    layer.weight.data.copy_(weight[tokens])
    layer.quant_method.process_weights_after_loading(layer)  # for a CPU, vLLM packs the weights there
    return lambda hidden: tokens[layer.quant_method.apply(layer, hidden).argmax(dim=-1)]
