"""Static pruning beside the shipped artifact, at as many layers: perplexity on a text.

    python examples/prune_and_compare.py TEXT OUT [TOKENS]

OUT/artifact and OUT/checkpoint can be served; the command prints how.
"""

import sys
from pathlib import Path

from vllm_buddy.artifact import shipped_artifacts
from vllm_buddy.cli import main as vllm_buddy

LAYERS = "22"
BUDGET = "0.75"


def main() -> int:
    if len(sys.argv) not in (3, 4):
        sys.exit("usage: python examples/prune_and_compare.py TEXT OUT [TOKENS]")
    text, out = sys.argv[1], Path(sys.argv[2])
    tokens = sys.argv[3] if len(sys.argv) > 3 else "8192"
    if status := vllm_buddy(["prune", "shortgpt", "--layers", LAYERS, str(out)]):
        return status
    policies = f"buddy,shortgpt,pruned={out / 'artifact'}"  # the last two are the same layers, and so is the figure
    artifact = str(shipped_artifacts()["smollm2-135m"])
    command = ["eval", "--artifact", artifact, "--text", text, "--text-tokens", tokens, "--budgets", BUDGET]
    return vllm_buddy([*command, "--policy", policies])


if __name__ == "__main__":
    sys.exit(main())
