"""Pruning orders that depend only on the number of layers."""

import random


def reverse_order(num_layers: int, seed: int) -> list[int]:
    """Return the middle layers from the end: the layer before the last is removed first."""
    del seed
    return list(range(num_layers - 2, 0, -1))


def evenly_spaced_order(num_layers: int, seed: int) -> list[int]:
    """Always remove the layer farthest from both ends and from all removed layers; of equal layers the deeper one."""
    del seed
    order: list[int] = []
    left = list(range(1, num_layers - 1))
    while left:
        taken = (0, num_layers - 1, *order)
        order.append(max(left, key=lambda layer: (min(abs(layer - other) for other in taken), layer)))
        left.remove(order[-1])
    return order


def random_order(num_layers: int, seed: int) -> list[int]:
    """Return a random permutation of the middle layers, drawn with `seed`."""
    order = list(range(1, num_layers - 1))
    random.Random(seed).shuffle(order)
    return order
