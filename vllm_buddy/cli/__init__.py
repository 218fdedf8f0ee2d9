"""The command line `vllm-buddy`: one module per command."""

from vllm_buddy.cli.main import main

__all__ = ["main"]
