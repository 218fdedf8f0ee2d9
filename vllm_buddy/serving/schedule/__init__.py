"""Routing in vLLM's scheduler: the plan of each step, prefix caching, outcome and metrics."""
