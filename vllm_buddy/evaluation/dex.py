"""What depth exploration (DEX, arXiv 2606.29223) would gain on several devices, one pipeline stage each."""

from collections.abc import Sequence
from typing import Any

import torch

from vllm_buddy.evaluation.draft_walk import Drafts


def earliest_agreeing(said_by: Sequence[torch.Tensor], said: torch.Tensor) -> torch.Tensor:
    """The number of the first of said_by, from shallow to deep, from which on all say `said`; len(said_by): none does.

    All tensors have one shape, and so has the result.
    """
    agrees = torch.stack([one == said for one in said_by]).flip(0).cummin(dim=0).values
    return len(said_by) - agrees.sum(dim=0)


def ead_of_stages(drafts: Drafts, num_stages: int) -> torch.Tensor:
    """[n], the stage, from 1, whose exit and all later ones say what the model says."""
    exits = list(drafts.stages[num_stages])
    return earliest_agreeing(exits, drafts.said)[:, drafts.start : -1].flatten() + 1


def dex_row(ead: torch.Tensor, num_stages: int) -> dict[str, Any]:
    """Speed-up over decoding token by token, of the best single exit and of depth exploration (DEX).

    One pipeline stage per device; time is counted in stages. A token that all stages must confirm enters the pipeline
    as soon as the token before it is known. Token by token that takes num_stages. With a single exit at stage e it
    takes e where the exit is right, and num_stages where it is not, because what followed is then thrown away. With
    exploration each stage's candidate goes on, and the branch of the shallowest right one survives: the EAD. Devices
    run any number of branches at once, and moving states between them takes no time: this is an upper bound.

    ead: [n], the earliest agreeing stage of each token, from 1 to num_stages.
    """
    by_exit = []
    for stage in range(1, num_stages):
        right = (ead <= stage).double()
        by_exit.append((float(num_stages / (stage * right + num_stages * (1 - right)).mean()), stage))
    best, stage = max(by_exit)
    exploration = float(num_stages / ead.double().mean())
    return {
        "devices": num_stages,
        "exit_stage": stage,
        "exit_speedup": best,
        "exploration_speedup": exploration,
        "ratio": exploration / best,
    }
