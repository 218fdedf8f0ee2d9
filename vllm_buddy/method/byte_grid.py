"""Rounds weights to 8 bits. Training rounds before it evaluates, so an artifact stores exactly the evaluated values."""

import numpy as np

_LARGEST_CODE = 127
_SCALE_STEPS = 1 << 16


def byte_grid(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest 8-bit codes of a table, with one scale per column.

    table: [rows, columns], float32.

    Returns:
        (codes [rows, columns] int8, scale [columns] float32). A scale has 16 significant bits, so codes * scale is
        exact, and rounding an already rounded table gives the same codes and scales.
    """
    fraction, exponent = np.frexp(np.abs(table).max(axis=0).astype(np.float64) / _LARGEST_CODE)
    scale = np.ldexp(np.rint(fraction * _SCALE_STEPS) / _SCALE_STEPS, exponent)
    scale[scale == 0] = 1.0
    codes = np.rint(table / scale).clip(-_LARGEST_CODE, _LARGEST_CODE)
    return codes.astype(np.int8), scale.astype(np.float32)


def on_byte_grid(table: np.ndarray) -> np.ndarray:
    """Return `table` [rows, columns], float32, rounded to its 8-bit grid."""
    codes, scale = byte_grid(table)
    return codes * scale
