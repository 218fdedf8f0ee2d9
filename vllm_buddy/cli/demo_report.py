"""What `vllm-buddy demo` measured: the checks on it, its table, its JSON file."""

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from vllm_buddy.artifact import Artifact
from vllm_buddy.cli.chat_client import Answer
from vllm_buddy.cli.table import format_table, shorten
from vllm_buddy.errors import BudgetError
from vllm_buddy.method import depth_for_budget

_PROMPT_WIDTH = 28


@dataclass(frozen=True)
class DemoResult:
    """alone: one request at a time, whole answers. mixed: the same requests all at once, streamed."""

    num_layers: int
    alone: list[Answer]
    mixed: list[Answer]
    mixed_wall_s: float

    @property
    def budgets(self) -> list[float]:
        return sorted({a.budget for a in self.alone}, reverse=True)

    def rows(self) -> list[dict[str, Any]]:
        """One row per budget, rates as means over its requests."""
        rows = []
        for budget in self.budgets:
            alone = [a for a in self.alone if a.budget == budget]
            counted = [a.outcome["layers_executed_mean"] for a in alone if a.outcome]
            layers = fmean(counted) if counted else None
            rows.append(
                {
                    "budget": budget,
                    "layers_executed_mean": layers,
                    "num_layers": self.num_layers,
                    "skipped_share": None if layers is None else 1 - layers / self.num_layers,
                    "tokens_per_s_alone": fmean(a.tokens_per_s for a in alone),
                    "tokens_per_s_mixed": fmean(a.tokens_per_s for a in self.mixed if a.budget == budget),
                }
            )
        return rows

    @property
    def tokens_per_s_mixed_total(self) -> float:
        return sum(a.num_tokens for a in self.mixed) / self.mixed_wall_s

    @property
    def num_equal_texts(self) -> int:
        """Requests whose streamed text in the mixed batch is the one they got alone."""
        alone = {(a.prompt, a.budget): a.text for a in self.alone}
        return sum(alone[a.prompt, a.budget] == a.text for a in self.mixed)

    def failures(self) -> list[str]:
        """What the server's own count says against the budgets; empty where every token ran exactly its depth."""
        found = []
        for a in self.alone:
            where = f"budget {a.budget:g}, prompt {shorten(a.prompt, 30)!r}"
            if a.outcome is None:
                found.append(f"{where}: the answer does not say which layers ran; the stock model may have been served")
                continue
            depth = depth_for_budget(a.budget, self.num_layers)
            counted = (a.outcome["layers_executed_min"], a.outcome["layers_executed_max"])
            if counted != (depth, depth):
                found.append(f"{where}: {counted[0]} to {counted[1]} layers ran per token, the budget says {depth}")
        return found

    def table(self, width: int) -> str:
        """One row per budget with a line of text per prompt, no line longer than `width`."""
        header = ["budget", f"layers\nof {self.num_layers}", "skipped", "tokens/s\nalone", "tokens/s\nmixed"]
        cells = []
        for row in self.rows():
            answers = [a for a in self.alone if a.budget == row["budget"]]
            cells.append(
                [
                    str(row["budget"]),
                    "?" if row["skipped_share"] is None else f"{row['layers_executed_mean']:.1f}",
                    "?" if row["skipped_share"] is None else f"{row['skipped_share']:.0%}",
                    f"{row['tokens_per_s_alone']:.1f}",
                    f"{row['tokens_per_s_mixed']:.1f}",
                    "\n".join(shorten(a.prompt, _PROMPT_WIDTH) for a in answers),
                    "\n".join(" ".join(a.text.split()) for a in answers),
                ]
            )
        return format_table([*header, "prompt", "text (its beginning)"], cells, width)

    def summary(self) -> str:
        """Two lines about the mixed batch."""
        return (
            f"mixed: {len(self.mixed)} requests at once, {self.tokens_per_s_mixed_total:.1f} tokens/s in all; a batch "
            "steps as fast as its deepest request.\n"
            f"{self.num_equal_texts} of {len(self.mixed)} texts are those got alone; bf16 sums may round differently "
            "in another batch."
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows(),
            "mixed": {
                "num_requests": len(self.mixed),
                "wall_s": self.mixed_wall_s,
                "tokens_per_s_total": self.tokens_per_s_mixed_total,
                "texts_equal_to_alone": self.num_equal_texts,
            },
            "requests_alone": [asdict(a) for a in self.alone],
            "requests_mixed": [asdict(a) for a in self.mixed],
        }


def parse_budgets(text: str, num_layers: int) -> list[float]:
    """Budgets from "1.0,0.75,0.5", each checked against the model.

    Raises:
        BudgetError: a word, or a number the model does not allow.
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


def caveat(artifact: Artifact) -> str | None:
    """The line about quality that an untrained artifact needs."""
    if artifact.config.recipe is not None:
        return None
    return (
        f"The artifact '{artifact.config.name}' is untrained, its paths follow a layer-importance prior alone: expect "
        "poor text well below budget 1. What this shows is depth per request and speed, not quality."
    )
