"""Reports in one line, with settings that help, that a model does not fit into the memory of its device."""

import argparse
from collections.abc import Callable
from functools import wraps

from vllm_buddy.errors import ModelError, cut

Run = Callable[[argparse.Namespace], int]


def says_what_saves_memory(advice: str) -> Callable[[Run], Run]:
    """Return a decorator for `run` of a command. advice: what a user can change, as the end of a sentence."""

    def decorate(run: Run) -> Run:
        @wraps(run)
        def told(args: argparse.Namespace) -> int:
            try:
                return run(args)
            except RuntimeError as error:
                import torch  # which is loaded by now; commands start without it

                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                what = ". ".join(cut(str(error)).split(". ")[:2]).rstrip(".")
                raise ModelError(f"the memory of the device is full ({what}); {advice}") from None

        return told

    return decorate
