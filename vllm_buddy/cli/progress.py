"""Progress on standard error: one line that is written over on a terminal, the last one alone elsewhere."""

import sys


def print_progress(what: str, done: int, total: int) -> None:
    """Show that `done` of `total` steps of `what` are over."""
    if sys.stderr.isatty() or done == total:
        print(f"{what}: {done} of {total}", end="\n" if done == total else "\r", file=sys.stderr, flush=True)
