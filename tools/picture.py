"""Draws docs/batch.svg: one batch of three requests with different budgets, and the layers that each token runs.

The paths are real: those of the shipped artifact with depths per token, for the prompts below.

    python -m tools.picture
"""

import argparse
import sys
from collections.abc import Iterator
from html import escape

from tools.tables.results import ROOT
from vllm_buddy.artifact import load_artifact, shipped_artifacts
from vllm_buddy.method import TokenRoute, TokenSchedule, full_path
from vllm_buddy.models.embedded import fetch

PICTURE = ROOT / "docs" / "batch.svg"
ARTIFACT = "smollm2-135m-token"
REQUESTS = (
    (1.0, "Explain in two sentences why the sky is blue, and red at dusk."),
    (0.75, "The capital of France is Paris. What is it known for today?"),
    (0.5, "def add(a, b): return a + b. Say what this does."),
)
WIDE, HIGH, GAP = 15, 9, 2  # px: pitch of the cells, and the space between two
BETWEEN, LEFT, TOP, BELOW = 34, 60, 44, 66  # px: between requests, and around all of them
STYLE = """
svg { font: 12px system-ui, sans-serif; }
.run { fill: #1f6feb; } .skip { fill: #d8dee4; } .name { fill: #1f2328; font-weight: 600; } .note { fill: #59636e; }
.token { fill: #59636e; font: 10px ui-monospace, monospace; }
@media (prefers-color-scheme: dark) {
  .run { fill: #4493f8; } .skip { fill: #2d333b; } .name { fill: #f0f6fc; } .note, .token { fill: #9198a1; }
}
"""


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m tools.picture", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    PICTURE.write_text(draw())
    return 0


def draw() -> str:
    """Return the picture as SVG. It needs the embedded model's tokenizer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fetch() / "tokenizer.json"))
    router = load_artifact(shipped_artifacts()[ARTIFACT]).token
    assert router is not None
    num_layers = router.num_layers
    parts, x = list(_layer_names(num_layers)), LEFT
    for budget, prompt in REQUESTS:
        encoded = tokenizer.encode(prompt)
        paths = [full_path(num_layers)] * len(encoded.ids)
        if budget < 1:
            runs = TokenRoute(router, TokenSchedule(), budget, encoded.ids).runs(0, len(encoded.ids), encoded.ids)
            paths = [run.path for run in runs for _ in range(run.num_tokens)]
        mean = sum(path.bit_count() for path in paths) / len(paths)
        parts.append(_text(x, 16, "name", f"budget {budget:g}"))
        parts.append(_text(x, 33, "note", f"{mean:.1f} layers a token"))
        for column, (path, token_id) in enumerate(zip(paths, encoded.ids)):
            left = x + column * WIDE
            parts += _column(left, path, num_layers)
            place = f"translate({left + 10} {TOP + num_layers * HIGH + 7}) rotate(-90)"
            word = escape(tokenizer.decode([token_id]).strip())
            parts.append(f'<text class="token" transform="{place}" text-anchor="end">{word}</text>')
        x += len(paths) * WIDE + BETWEEN
    width, height = x - BETWEEN + 8, TOP + num_layers * HIGH + BELOW
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img">'
        "<title>Three requests in one batch: which of the model's layers each token runs</title>"
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _layer_names(num_layers: int) -> Iterator[str]:
    yield _text(0, TOP + 9, "note", f"layer {num_layers}")
    yield _text(0, TOP + (num_layers - 1) * HIGH + 9, "note", "layer 1")


def _column(left: int, path: int, num_layers: int) -> list[str]:
    """The cells of one token, the last layer on top."""
    wide, high = WIDE - GAP, HIGH - GAP
    cells: dict[str, str] = {"run": "", "skip": ""}
    for layer in range(num_layers):
        top = TOP + (num_layers - 1 - layer) * HIGH
        cells["run" if path >> layer & 1 else "skip"] += f"M{left} {top}h{wide}v{high}h-{wide}z"
    return [f'<path class="{kind}" d="{d}"/>' for kind, d in cells.items() if d]


def _text(x: int, y: int, kind: str, words: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>'


if __name__ == "__main__":
    sys.exit(main())
