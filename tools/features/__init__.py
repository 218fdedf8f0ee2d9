"""Ordinary features of vLLM, each tried on a running server at several budgets by `python -m tools.compatibility`."""
