"""Budget-driven dynamic depth routing (BUDDY) for vLLM: per-request depth in a real serving engine."""

__version__ = "0.1.0"
