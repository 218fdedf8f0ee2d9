"""Plain text tables."""

from vllm_buddy.cli.table import format_table, shorten


def test_columns_are_aligned_and_lines_unpadded() -> None:
    """A table that does not line up cannot be read, and trailing blanks wrap on narrow terminals."""
    text = format_table(["a", "long header"], [["1", "x"], ["22", "yy"]])
    assert text.split("\n") == ["a   long header", "--  -----------", "1   x", "22  yy"]


def test_cells_with_several_lines() -> None:
    """The demo has one line per prompt in a cell."""
    text = format_table(["n", "text"], [["1", "one\ntwo"], ["2", "three"]])
    assert text.split("\n") == ["n  text", "-  -----", "1  one", "   two", "2  three"]


def test_last_column_is_cut_to_the_width() -> None:
    """Model output is longer than any terminal."""
    text = format_table(["n", "text"], [["1", "x" * 100]], width=20)
    assert max(len(line) for line in text.split("\n")) == 20
    assert text.endswith("…")


def test_shorten_keeps_one_line() -> None:
    """A newline in generated text must not break the table."""
    assert shorten("a\nb", 10) == "a b"
    assert shorten("abcdef", 4) == "abc…"
