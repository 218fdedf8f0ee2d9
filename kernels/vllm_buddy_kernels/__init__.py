"""Triton kernels of vllm_buddy, each beside its plain-PyTorch reference."""
