"""Benchmarks of speed and memory on this machine: decode, prefill, mixed budgets, serving, overload, memory."""
