"""Lets torch compute on one thread for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def on_one_thread() -> Iterator[None]:
    """Keep torch's operations on the calling thread.

    In a process that was forked from one where torch had used several threads, an operation on several waits for ever.
    vLLM makes its configuration without any, so a program may fork before it.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
