"""Decode steps as CUDA graphs of layers and of paths."""
