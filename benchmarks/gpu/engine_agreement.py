"""Checks that engines in separate processes compute the same, by the likeliest tokens after the same prompts.

At the shapes of large models a plain forward in float32 takes too long, so pairs of programs are compared: buddy
without bypass with stock vLLM on a model that has only buddy's layers, and buddy with bypass with itself in eager mode
without kernels. A comparison that would also pass with other layers proves nothing, so each run tries that too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.gpu.engine_job import COMPARED, EAGER, NO_BYPASS, check_prompts
from benchmarks.harness.reference_check import Reference, Routing
from benchmarks.harness.rounds import Refused

Distribution = Mapping[int, float]
Found = Sequence[Sequence[Distribution]]  # [compared token][prompt]

# Bounds for the 20 likeliest tokens, for every prompt and compared token. Observed with drawn weights in 32 layers of
# hidden size 512: two programs in bfloat16 have at least 18 in common and are at most 0.12 nats apart on each of 40
# prompts. With one layer left out, or two exchanged, none of 6 prompts has both more than 15 in common and a distance
# below 0.4 nats.
MIN_COMMON = 16
MAX_DISTANCE = 0.3


def difference(ours: Found, theirs: Found) -> str | None:
    """Return how far apart the worst two distributions are, or None if all are equal up to rounding."""
    worst_common, worst_distance = float("inf"), 0.0
    for ours_of_token, theirs_of_token in zip(ours, theirs, strict=True):
        for one, other in zip(ours_of_token, theirs_of_token, strict=True):
            common = one.keys() & other.keys()
            distance = float(np.mean([abs(one[t] - other[t]) for t in common])) if common else float("inf")
            worst_common = min(worst_common, len(common))
            # NaN must not pass: a comparison with it is false.
            worst_distance = distance if not distance <= worst_distance else worst_distance
    if worst_common >= MIN_COMMON and worst_distance <= MAX_DISTANCE:
        return None
    return f"{worst_common} likeliest tokens in common and {worst_distance:.2f} nats apart in the worst case"


@dataclass
class Outputs:
    """Outputs of the variants of a model, by variant and batch size."""

    found: dict[tuple[str, int], Found] = field(default_factory=dict)

    def add(self, variant: str, batch: int, found: Sequence[Sequence[Mapping[str, float]]]) -> None:
        """Add the outputs of a variant. found: as read from JSON, with token ids as text."""
        self.found[variant, batch] = [[{int(t): lp for t, lp in d.items()} for d in prompts] for prompts in found]

    def problem(self, one: str, other: str, batch: int) -> str | None:
        """Return why the two cannot be said to compute the same, or None if they do."""
        for variant in (one, other):
            if (variant, batch) not in self.found:
                return f"there are no outputs of '{variant}'"
        apart = difference(self.found[one, batch], self.found[other, batch])
        return apart and f"'{one}' and '{other}' differ: {apart}"

    def blind(self, one: str, other: str, batch: int) -> str | None:
        """Return why a comparison with either proves nothing: they compute different things and look the same."""
        if (one, batch) in self.found and (other, batch) in self.found and self.problem(one, other, batch) is None:
            return f"'{one}' and '{other}' should differ and do not, so the comparison is blind"
        return None


def refusals_by_peers(outputs: Outputs, batch: int, budgets: Sequence[float], has_bypass: bool) -> dict[str, str]:
    """Return the variants that may not be shown, and why, for a model with drawn weights.

    budgets: of buddy, 1.0 among them. Peers are called "stock" and "pruned B".
    """
    same = [(f"buddy {b}" + (NO_BYPASS if has_bypass and b < 1.0 else ""), peer(b)) for b in budgets]
    refused: dict[str, str] = {}
    for buddy, its_peer in same:
        problem = outputs.problem(buddy, its_peer, batch)
        for _, another in same:
            if another != its_peer:
                problem = problem or outputs.blind(buddy, another, batch)
        if problem:
            refused[buddy] = refused[its_peer] = problem
    for budget in budgets if has_bypass else ():
        if budget == 1.0:
            continue
        variant = f"buddy {budget}"
        problem = (
            refused.get(variant + NO_BYPASS)
            or outputs.problem(variant, variant + EAGER, batch)
            or outputs.blind(variant, variant + NO_BYPASS, batch)
        )
        if problem:
            refused[variant] = problem
    return refused


def refusals_by_reference(
    outputs: Outputs, batch: int, variants: Sequence[Routing], reference: Reference, vocab_size: int, longest: int
) -> dict[str, str]:
    """Do the same for a model with real weights, against one plain forward."""
    prompts = check_prompts(vocab_size, batch, longest)
    refused = {}
    for variant in variants:
        found = outputs.found.get((variant.name, batch))
        if found is None:
            refused[variant.name] = f"there are no outputs of '{variant.name}'"
            continue
        for token, distributions in zip(COMPARED, found, strict=True):
            # The reference looks at the token after a prompt and its last token again.
            so_far = [[*prompt, *prompt[-1:] * (token - 1)] for prompt in prompts]
            try:
                reference.check(variant, so_far, distributions)
            except Refused as refusal:
                refused[variant.name] = str(refusal)
    return refused


def peer(budget: float) -> str:
    """Return the name of the stock vLLM variant with the layers of buddy's path."""
    return "stock" if budget == 1.0 else f"pruned {budget}"
