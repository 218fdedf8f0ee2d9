"""Prints progress on standard error: one line that is rewritten on a terminal, only the last line elsewhere."""

import sys


def print_progress(what: str, done: int, total: int) -> None:
    """Show that `done` of `total` steps of `what` are done."""
    if sys.stderr.isatty() or done == total:
        print(f"{what}: {done} of {total}", end="\n" if done == total else "\r", file=sys.stderr, flush=True)
