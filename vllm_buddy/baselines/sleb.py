"""SLEB (arXiv 2402.09025): removes the layer whose removal hurts least, measures the rest again, and repeats.

Exact savings: the hidden states below a layer are kept from trial to trial and from round to round, and a trial ends as
soon as its loss is beyond the best of its round. With `candidates`, each round tries only the layers that cost least
when they were last tried, which is another search: it may miss the best layer.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vllm_buddy.importance.layer_stack import LayerStack


@dataclass(frozen=True)
class SearchCost:
    """Passes that a search takes for each window at most: of one layer, and of the language-model head."""

    layers: int
    heads: int


def search_cost(num_layers: int, candidates: int | None = None) -> SearchCost:
    """Return what the search on a model of `num_layers` takes at most; see `sleb_order` for `candidates`."""
    num_middle = num_layers - 2
    layers = heads = 0
    for left in range(num_middle, 1, -1):
        tried = left if candidates is None or left == num_middle else min(candidates, left)
        layers += left - 1 + sum(left - trial for trial in range(tried))  # states below, then those above each layer
        heads += tried
    return SearchCost(layers + 1, heads)


@torch.no_grad()
def sleb_order(
    model: nn.Module,
    windows: torch.Tensor,
    progress: Callable[[int, int], None],
    candidates: int | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """Return the greedy order of the middle layers by calibration loss; of equal layers the deeper one goes first.

    windows: [num_windows, window] token ids. candidates: layers that are tried in each round after the first; None: all
    that are left. note: called with one line about what the search takes, before it starts.
    """
    stack = LayerStack(model, windows.shape[1])
    num_middle = stack.num_layers - 2
    note(_forecast(stack, windows, candidates))
    trials = _Trials(stack, windows)
    increase: dict[int, float] = {}  # of the loss, when a layer was last tried to the end
    order: list[int] = []
    current = 0.0
    while len(order) < num_middle - 1:
        # Likely ones first, so that the others end early; at first that is the deepest.
        ranked = sorted(trials.middle, key=lambda layer: (increase.get(layer, math.inf), -layer))
        if order and candidates is not None:
            ranked = ranked[:candidates]
        to_the_end = not order and candidates is not None  # the first round ranks all layers
        best, lowest = ranked[0], math.inf
        for layer in ranked:
            loss = trials.loss(layer, math.inf if to_the_end else lowest)
            if loss is None:
                continue
            increase[layer] = loss - current
            if (loss, -layer) < (lowest, -best):
                best, lowest = layer, loss
        if not order:  # the loss without the cheapest layer stands in for that of the whole model
            increase = {layer: loss - lowest for layer, loss in increase.items()}
        order.append(best)
        trials.remove(best)
        current = lowest
        progress(len(order), num_middle)
    order += trials.middle
    progress(num_middle, num_middle)
    return order


class _Trials:
    """Calibration losses without one more layer. `middle`: the middle layers that are left."""

    def __init__(self, stack: LayerStack, windows: torch.Tensor) -> None:
        self._stack, self._windows = stack, windows
        self._last = stack.num_layers - 1
        self.middle = list(range(1, self._last))
        # Of each window, the hidden state before each layer of `middle`, as far as it was needed.
        self._states = [[stack.layer(0, stack.embed(window))] for window in windows]

    def loss(self, layer: int, most: float) -> float | None:
        """Return the loss without `layer`, summed over all tokens; None as soon as it is beyond `most`."""
        place = self.middle.index(layer)
        above = (*self.middle[place + 1 :], self._last)
        total = 0.0
        for window, states in zip(self._windows, self._states):
            while len(states) <= place:
                states.append(self._stack.layer(self.middle[len(states) - 1], states[-1]))
            for part in self._stack.loss_parts(self._stack.run(above, states[place]), window):
                total += float(part)
                if total > most:
                    return None
        return total

    def remove(self, layer: int) -> None:
        """Leave `layer` out from now on."""
        place = self.middle.index(layer)
        del self.middle[place]
        for states in self._states:
            del states[place + 1 :]


def _forecast(stack: LayerStack, windows: torch.Tensor, candidates: int | None) -> str:
    hidden = stack.layer(0, stack.embed(windows[0]))  # the first pass of all is slower
    layer = _seconds(lambda: stack.layer(1, hidden), stack.device)
    head = _seconds(lambda: stack.loss(hidden, windows[0]), stack.device)

    def cost(tried: int | None) -> str:
        passes = search_cost(stack.num_layers, tried)
        minutes = len(windows) * (passes.layers * layer + passes.heads * head) / 60
        return f"{passes.layers:,} layer and {passes.heads:,} head passes, {minutes:.1f} minutes"

    line = f"at most {len(windows)} windows x {cost(candidates)} at the speed of the first window"
    return line if candidates is not None else f"{line}; with candidates 4, {cost(4)}"


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
