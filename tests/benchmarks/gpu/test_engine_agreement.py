"""Tests when engines in separate processes count as computing the same, and what is refused if they do not."""

import math
from typing import Any

import pytest

from benchmarks.gpu.engine_agreement import MIN_COMMON, Outputs, difference, refusals_by_peers, refusals_by_reference
from benchmarks.gpu.engine_job import COMPARED, EAGER, NO_BYPASS, check_prompts
from benchmarks.harness.reference_check import Routing
from benchmarks.harness.rounds import Refused

PEERS = ("stock", "pruned 0.5")
BUDDIES = ("buddy 1.0", "buddy 0.5", "buddy 0.5" + NO_BYPASS)


def found(first_token: int, shift: float = 0.0) -> list[list[dict[str, float]]]:
    """Return outputs of two prompts whose likeliest tokens begin with `first_token`."""
    likeliest = {str(first_token + i): -3.0 - 0.1 * i + shift for i in range(20)}
    return [[likeliest, likeliest] for _ in COMPARED]


def right_outputs(batch: int = 1) -> Outputs:
    """Return outputs in which everything agrees that should agree, and nothing else."""
    outputs = Outputs()
    for variant, first_token in {
        "stock": 0, "buddy 1.0": 0, "pruned 0.5": 100, "buddy 0.5" + NO_BYPASS: 100,
        "buddy 0.5": 200, "buddy 0.5" + EAGER: 200,
    }.items():  # fmt: skip
        outputs.add(variant, batch, found(first_token))
    return outputs


def refused(outputs: Outputs) -> set[str]:
    return set(refusals_by_peers(outputs, 1, (1.0, 0.5), True))


def test_equal_outputs_are_not_refused() -> None:
    """Fails if rounding, or one of the least likely tokens, keeps figures from being shown."""
    assert refused(right_outputs()) == set()
    one, other = Outputs(), Outputs()
    one.add("a", 1, found(0))
    other.add("a", 1, found(2, shift=0.05))
    assert difference(one.found["a", 1], other.found["a", 1]) is None


@pytest.mark.parametrize(
    ("variant", "wrong", "expected"),
    [
        ("buddy 1.0", found(50), {"buddy 1.0", "stock"}),
        ("buddy 1.0", found(0, shift=0.5), {"buddy 1.0", "stock"}),
        ("buddy 1.0", found(0, shift=math.nan), {"buddy 1.0", "stock"}),
        ("buddy 0.5" + NO_BYPASS, found(50), {"pruned 0.5", "buddy 0.5", "buddy 0.5" + NO_BYPASS}),
        ("buddy 0.5", found(50), {"buddy 0.5"}),
        ("buddy 0.5" + EAGER, found(50), {"buddy 0.5"}),
    ],
)
def test_wrong_outputs_refuse_what_rests_on_them(variant: str, wrong: Any, expected: set[str]) -> None:
    """Fails if a variant that computes something else is timed, or right ones are refused with it."""
    outputs = right_outputs()
    outputs.add(variant, 1, wrong)
    assert refused(outputs) == expected


def test_one_wrong_row_is_enough() -> None:
    """Fails if a mean over many prompts hides a prompt whose rows were mixed up."""
    right, wrong = found(0)[0][0], found(20 - MIN_COMMON + 1)[0][0]
    one, other = Outputs(), Outputs()
    one.add("a", 8, [[right] * 8, [right] * 8])
    other.add("a", 8, [[right] * 8, [right] * 7 + [wrong]])
    assert difference(one.found["a", 8], other.found["a", 8]) is not None


def test_a_blind_comparison_refuses() -> None:
    """Fails if models of different depths that look alike count as a successful check, as flat logits would."""
    outputs = Outputs()
    for variant in (*PEERS, *BUDDIES, "buddy 0.5" + EAGER):
        outputs.add(variant, 1, found(0))
    assert refused(outputs) == {*PEERS, *BUDDIES}
    outputs = right_outputs()
    for variant in ("buddy 0.5", "buddy 0.5" + EAGER):
        outputs.add(variant, 1, found(100))  # no trace of the bypass
    assert refused(outputs) == {"buddy 0.5"}


def test_missing_outputs_refuse() -> None:
    """Fails if an engine that died counts as checked."""
    outputs = right_outputs()
    del outputs.found["pruned 0.5", 1]
    assert refused(outputs) == {"pruned 0.5", "buddy 0.5", "buddy 0.5" + NO_BYPASS}


def test_the_reference_looks_behind_the_compared_tokens() -> None:
    """Fails if outputs of a real model are compared with those of another position, or a refusal is lost."""

    class StubReference:
        def check(self, variant: Routing, prompts: list[list[int]], outputs: Any) -> None:
            asked.append((variant.name, prompts))
            if variant.name == "wrong":
                raise Refused("something else")

    asked: list[tuple[str, list[list[int]]]] = []
    outputs = Outputs()
    for name in ("right", "wrong"):
        outputs.add(name, 2, found(0))
    variants = [Routing(name=name, layers=4) for name in ("right", "wrong", "missing")]
    reference: Any = StubReference()
    refused = refusals_by_reference(outputs, 2, variants, reference, 512, 300)
    assert refused == {"wrong": "something else", "missing": "there are no outputs of 'missing'"}
    prompts = check_prompts(512, 2, 300)
    # The reference appends the last token once more: for token n, it stands n times after the prompt.
    assert [name for name, _ in asked] == ["right", "right", "wrong", "wrong"]
    for token, (_, looked_at) in zip(COMPARED, asked[:2], strict=True):
        assert looked_at == [[*prompt, *[prompt[-1]] * (token - 1)] for prompt in prompts]
