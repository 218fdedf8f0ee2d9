"""The results of `vllm-buddy demo`: checks, what is printed and the JSON file."""

import textwrap
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from vllm_buddy.artifact import Artifact
from vllm_buddy.cli.chat_client import Answer
from vllm_buddy.cli.table import format_table, shorten
from vllm_buddy.method import depth_for_budget

_ROUNDING = 1e-6  # of a mean of layers


@dataclass(frozen=True)
class DemoResult:
    """The answers of a demo.

    alone: to requests that are sent one at a time. mixed: to the same requests sent all at once, streamed.
    mixed_wall_s: seconds from the first of the mixed requests to the last answer. by_token: whether tokens have depths
        of their own, with the budget as their mean at most.
    """

    num_layers: int
    alone: list[Answer]
    mixed: list[Answer]
    mixed_wall_s: float
    by_token: bool = False

    @property
    def budgets(self) -> list[float]:
        return sorted({float(a.budget) for a in self.alone}, reverse=True)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per budget; rates are means over its requests."""
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
        """Number of requests whose text in the mixed batch equals the text that they got alone."""
        alone = {(a.prompt, a.budget): a.text for a in self.alone}
        return sum(alone[a.prompt, a.budget] == a.text for a in self.mixed)

    def failures(self) -> list[str]:
        """Return one line per answer whose layer counts contradict its budget; empty if there is none."""
        found = []
        for a in self.alone:
            budget = float(a.budget)
            where = f"budget {budget:g}, prompt {shorten(a.prompt, 30)!r}"
            if a.outcome is None:
                found.append(f"{where}: the answer has no layer counts; perhaps the stock model was served")
                continue
            depth = depth_for_budget(budget, self.num_layers)
            counted = (a.outcome["layers_executed_min"], a.outcome["layers_executed_max"])
            if self.by_token:
                mean, most = a.outcome["layers_executed_mean"], budget * self.num_layers
                if mean > most + _ROUNDING:
                    found.append(f"{where}: {mean:.2f} layers ran per token, but the budget allows {most:g} on average")
            elif counted != (depth, depth):
                found.append(
                    f"{where}: {counted[0]} to {counted[1]} layers ran per token, but the budget allows exactly {depth}"
                )
        return found

    def answers(self, width: int) -> str:
        """Return the whole answers by prompt and budget, in lines of at most `width` characters."""
        lines: list[str] = []
        for prompt in dict.fromkeys(a.prompt for a in self.alone):
            lines += ["", prompt]
            for a in (a for a in self.alone if a.prompt == prompt):
                layers = "?" if a.outcome is None else f"{a.outcome['layers_executed_mean']:.1f}"
                head = f"  {a.budget!s:<5} {layers:>4} layers  "
                text = " ".join(a.text.split())
                lines.append(textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head)))
        return "\n".join(lines[1:])

    def table(self) -> str:
        """Return a table with one row per budget."""
        header = ["budget", f"layers\nof {self.num_layers}", "skipped", "tokens/s\nalone", "tokens/s\nmixed"]
        cells = []
        for row in self.rows():
            layers = row["layers_executed_mean"]
            shares = ["?", "?"] if layers is None else [f"{layers:.1f}", f"{row['skipped_share']:.0%}"]
            rates = [f"{row[key]:.1f}" for key in ("tokens_per_s_alone", "tokens_per_s_mixed")]
            cells.append([str(row["budget"]), *shares, *rates])
        return format_table(header, cells)

    def summary(self) -> str:
        """Return two lines about the mixed batch."""
        return (
            f"alone: one request at a time, prefill included. mixed: {len(self.mixed)} requests at once, at "
            f"{self.tokens_per_s_mixed_total:.1f} tokens/s in total. A batch is as slow as its deepest request.\n"
            f"{self.num_equal_texts} of {len(self.mixed)} texts equal the texts that the requests got alone; bf16 sums "
            "may round differently in another batch."
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


def caveat(artifact: Artifact) -> str | None:
    """Return a warning about the quality of an untrained artifact; None for a trained one."""
    if artifact.config.recipe is not None:
        return None
    return (
        f"The artifact '{artifact.config.name}' is untrained: its paths follow a layer-importance prior alone. Expect "
        "poor text well below budget 1. This demo shows depth per request and speed, not quality."
    )
