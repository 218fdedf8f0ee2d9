"""Reads budgets from one word of a command line."""

from vllm_buddy.errors import BudgetError
from vllm_buddy.method.budget import depth_for_budget


def parse_budgets(text: str, num_layers: int) -> list[float]:
    """Parse budgets such as "1.0,0.75,0.5" and check each against the number of layers.

    Raises:
        BudgetError: a word is not a number, or the model does not allow it.
    """
    budgets = []
    for word in text.split(","):
        try:
            budget = float(word)
        except ValueError:
            raise BudgetError(f"budget is {word!r}; allowed is a number in (0, 1]") from None
        depth_for_budget(budget, num_layers)
        budgets.append(budget)
    return budgets
