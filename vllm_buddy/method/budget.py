"""Converts a compute budget (the share of layers to run) to a number of layers, and checks budgets of requests."""

import math

from vllm_buddy.errors import BudgetError, shown

MIN_DEPTH = 3  # the first layer, the last layer and at least one between them

# floor(b * L) would lose a layer to rounding at budgets such as 0.7 * 90 = 62.999... or 15/22 * 22 = 14.999...
ROUNDING = 1e-6


def depth_for_budget(budget: float, num_layers: int) -> int:
    """Return the number of layers a token executes at `budget`: floor(b * L), first and last layer included.

    The paper (BUDDY, section 3) rounds to the nearest number. At the paper's settings floor gives the same result, and
    it never exceeds the budget. The router chooses k = depth - 2 middle layers.

    Raises:
        BudgetError: the budget is outside (0, 1], or leaves fewer than three layers.
    """
    if not 0.0 < budget <= 1.0:  # also catches NaN
        raise BudgetError(f"budget is {shown(budget)}; allowed is a number in (0, 1]")
    depth = math.floor(budget * num_layers + ROUNDING)
    if depth < MIN_DEPTH:
        raise BudgetError(
            f"budget {budget:g} leaves {depth} of {num_layers} layers, but at least {MIN_DEPTH} must run; "
            f"the smallest allowed budget is {smallest_budget(num_layers):g}"
        )
    return depth


def runs_enough(budget: float, num_layers: int) -> bool:
    """Whether a budget leaves the layers that must run."""
    return math.floor(budget * num_layers + ROUNDING) >= MIN_DEPTH


def smallest_budget(num_layers: int) -> float:
    """Return the smallest budget, a multiple of 0.001, that leaves the first, the last and one middle layer."""
    return math.ceil(1000 * MIN_DEPTH / num_layers - 1e-9) / 1000


def budget_for_depth(depth: int, num_layers: int) -> float:
    """Return the budget that runs `depth` of `num_layers` layers: the smallest of those with the fewest decimals."""
    steps = 10
    while depth_for_budget(budget := math.ceil(steps * depth / num_layers - 1e-9) / steps, num_layers) != depth:
        steps *= 10
    return budget


def parse_budget(value: object) -> float:
    """Check the type and range of the budget that a request carries, and return it as a float.

    Raises:
        BudgetError: the value is not an int or float in (0, 1].
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BudgetError(f"budget is {shown(value)}; allowed is a number in (0, 1]")
    if not 0.0 < value <= 1.0:
        raise BudgetError(f"budget is {shown(value)}; allowed is a number in (0, 1]")
    return float(value)
