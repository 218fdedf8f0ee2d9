"""The command `vllm-buddy`."""

from vllm_buddy.cli.main import main

__all__ = ["main"]
