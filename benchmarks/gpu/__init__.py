"""What needs a GPU: kernels, decode steps at usual model sizes, one command for all of it."""
