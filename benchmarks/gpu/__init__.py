"""Benchmarks that need a CUDA device: kernels, decode steps of 7B to 8B models, and one command that runs all."""
