"""Prints the GPU, its driver, the versions of what serving uses, and whether vLLM finds the plugin.

    python -m benchmarks.gpu.facts

benchmarks.gpu.check runs it first. The exit status is 1 if vLLM does not find the plugin.
"""

import argparse
import platform
import subprocess
import sys

import torch
import transformers
import triton
import vllm

from benchmarks.harness.rounds import Refused
from vllm_buddy import __version__
from vllm_buddy.cli.plugin_check import plugin_problem

_ASKED = "name,driver_version,memory.total,memory.used,power.limit,clocks.max.sm,clocks.sm"


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.facts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    print(f"python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda})")
    print(f"triton {triton.__version__}, transformers {transformers.__version__}")
    print(f"vllm {vllm.__version__}, vllm-buddy {__version__}")
    problem = plugin_problem()
    print("plugin: " + ("found" if problem is None else "; ".join(problem)))
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv"]
    try:
        print(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip())
    except (OSError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi does not answer: {error}")
    if not torch.cuda.is_available():
        raise Refused("no CUDA device is found")
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}, {torch.cuda.device_count()} visible")
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
