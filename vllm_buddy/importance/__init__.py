"""Static layer importance, measured once and offline: the prior that every path starts from."""

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
