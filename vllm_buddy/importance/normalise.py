"""Converts raw importance to a prior on one scale that is the same for all indicators (BUDDY, section 3.3)."""

import numpy as np

from vllm_buddy.errors import CalibrationError

_CLIP = 3.0
_EPS = 1e-12


def normalise(raw: np.ndarray, *, log_scale: bool) -> np.ndarray:
    """Return the ranks u = (1 + rank) / (L + 1) of the robust z-scores, clipped to +-3.

    raw: [L], larger is more important; L counts the middle layers only.
    log_scale: apply log(1 + x) first. For negative x it is continued as an odd function, because skipping a layer can
        lower the perplexity, also by more than 1.

    Of equal values, the lower layer gets the higher rank, as in the router's top-k.

    Returns:
        [L], float32, in (0, 1), all different.

    Raises:
        CalibrationError: a value of `raw` is not finite.
    """
    values = np.asarray(raw, dtype=np.float64)
    if not np.isfinite(values).all():
        layers = ", ".join(str(i + 1) for i in np.flatnonzero(~np.isfinite(values)))
        raise CalibrationError(f"the importance of layers {layers} is not a finite number; the model may be damaged")
    if log_scale:
        values = np.sign(values) * np.log1p(np.abs(values))
    q25, median, q75 = np.percentile(values, [25, 50, 75])
    z = np.clip((values - median) / (q75 - q25 + _EPS), -_CLIP, _CLIP)
    most_important_first = np.argsort(-z, kind="stable")
    ranks = np.empty(len(z), dtype=np.int64)
    ranks[most_important_first] = np.arange(len(z))[::-1]
    return ((1 + ranks) / (len(z) + 1)).astype(np.float32)
