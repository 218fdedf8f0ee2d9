"""Runs the command line `vllm-buddy` as `python -m vllm_buddy`."""

import sys

from vllm_buddy.cli import main

if __name__ == "__main__":
    sys.exit(main())
