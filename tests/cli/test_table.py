"""Plain-text tables."""

from vllm_buddy.cli.table import format_table, shorten


def test_columns_are_aligned_and_lines_unpadded() -> None:
    """Fails if columns are not aligned, or lines have trailing blanks that wrap on narrow terminals."""
    text = format_table(["a", "long header"], [["1", "x"], ["22", "yy"]])
    assert text.split("\n") == ["a   long header", "--  -----------", "1   x", "22  yy"]


def test_cells_with_several_lines() -> None:
    """Fails if a cell of several lines, such as the demo's, breaks the table."""
    text = format_table(["n", "text"], [["1", "one\ntwo"], ["2", "three"]])
    assert text.split("\n") == ["n  text", "-  -----", "1  one", "   two", "2  three"]


def test_last_column_is_cut_to_the_width() -> None:
    """Fails if a long last column makes lines wider than the terminal."""
    text = format_table(["n", "text"], [["1", "x" * 100]], width=20)
    assert max(len(line) for line in text.split("\n")) == 20
    assert text.endswith("…")


def test_shorten_keeps_one_line() -> None:
    """Fails if a newline in generated text breaks the table."""
    assert shorten("a\nb", 10) == "a b"
    assert shorten("abcdef", 4) == "abc…"
