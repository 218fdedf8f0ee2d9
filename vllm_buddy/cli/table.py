"""Formats plain-text tables for a terminal."""

from collections.abc import Sequence


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return a table with aligned columns and a rule below the header. A cell may have several lines.

    width: if given, the last column is cut so that no line is longer.
    """
    cells = [[cell.split("\n") for cell in row] for row in (header, *rows)]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(header))]
    if width is not None:
        widths[-1] = max(len(header[-1]), min(widths[-1], width - sum(widths[:-1]) - 2 * (len(widths) - 1)))
    lines = []
    for row in cells:
        for i_line in range(max(len(cell) for cell in row)):
            parts = [cell[i_line] if i_line < len(cell) else "" for cell in row]
            parts[-1] = shorten(parts[-1], widths[-1])
            lines.append("  ".join(p.ljust(w) for p, w in zip(parts, widths)).rstrip())
    num_header_lines = max(len(cell) for cell in cells[0])
    lines.insert(num_header_lines, "  ".join("-" * w for w in widths))
    return "\n".join(lines)


def shorten(text: str, width: int) -> str:
    """Return `text` as one line, cut to `width` characters with an ellipsis."""
    line = " ".join(text.split(" ")).replace("\n", " ")
    return line if len(line) <= width else line[: max(0, width - 1)] + "…"
