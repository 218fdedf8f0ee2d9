"""Measures how important each layer of a model is, once and offline. The result is the prior of the router.

`base.py` lists the indicators (`taylor.py`, `delta_ppl.py`, `cosine.py`), `layer_stack.py` runs the model's layers for
them, `normalise.py` and `library.py` turn a measurement into a prior and a path library, and `build.py` makes the
artifact.
"""

from vllm_buddy.importance.base import INDICATORS, Indicator, find_indicator
from vllm_buddy.importance.build import PriorResult, build_prior
from vllm_buddy.importance.calibration import CalibrationText
from vllm_buddy.importance.library import nested_library
from vllm_buddy.importance.normalise import normalise
from vllm_buddy.importance.prior_settings import PriorSettings

__all__ = [
    "INDICATORS",
    "CalibrationText",
    "Indicator",
    "PriorResult",
    "PriorSettings",
    "build_prior",
    "find_indicator",
    "nested_library",
    "normalise",
]
