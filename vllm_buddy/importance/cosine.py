"""Block Influence: how much a layer changes the direction of the hidden state.

Source: ShortGPT, arXiv 2403.03853, section 2.2.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from vllm_buddy.importance.layer_stack import LayerStack


@torch.no_grad()
def cosine_dissimilarity(model: nn.Module, windows: torch.Tensor, progress: Callable[[int, int], None]) -> np.ndarray:
    """Return 1 - mean over tokens of cos(layer input, layer output) per middle layer.

    windows: [num_windows, window] token ids. Returns [num_layers - 2], float64, in [0, 2].
    """
    stack = LayerStack(model, windows.shape[1])
    similarity = np.zeros(stack.num_layers - 2)
    for done, window in enumerate(windows, start=1):
        hidden = stack.layer(0, stack.embed(window))
        for index in range(1, stack.num_layers - 1):
            out = stack.layer(index, hidden)
            similarity[index - 1] += float(torch.cosine_similarity(hidden.float(), out.float(), dim=-1).mean())
            hidden = out
        progress(done, len(windows))
    return 1.0 - similarity / len(windows)
