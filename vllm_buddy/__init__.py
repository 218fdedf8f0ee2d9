"""Dynamic depth for vLLM: each request chooses which share of the model's layers it runs (BUDDY routing)."""

__version__ = "0.2.0.dev0"
