"""Prints progress on standard error: one line that is rewritten on a terminal, a line now and then elsewhere."""

import sys
import time

_SECONDS_BETWEEN_LINES = 30.0  # where the output is a log

_last_line = time.monotonic()


def print_progress(what: str, done: int, total: int) -> None:
    """Show that `done` of `total` steps of `what` are done."""
    global _last_line
    on_terminal, now = sys.stderr.isatty(), time.monotonic()
    if on_terminal or done == total or now - _last_line >= _SECONDS_BETWEEN_LINES:
        end = "\r" if on_terminal and done < total else "\n"
        print(f"{what}: {done} of {total}", end=end, file=sys.stderr, flush=True)
        _last_line = now


def note(line: str) -> None:
    """Print a line about what happens to standard error."""
    print(line, file=sys.stderr, flush=True)
