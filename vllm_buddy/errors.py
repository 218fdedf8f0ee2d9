"""The errors that a user can cause. Each message says what was found, what is allowed and what to do.

What was found is shown by `shown`, because it may be of any length.
"""

from reprlib import Repr
from typing import Any

_MOST_CHARACTERS = 80
_SHORT = Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = 60


def shown(value: Any) -> str:
    """What a user sent, for an error message: its `repr`, cut to one line of at most 80 characters."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # Python prints integers of at most 4,300 digits
        text = f"<{type(value).__name__} that is too long to print>"
    return cut(text, _MOST_CHARACTERS)


def cut(text: str, most: int = 300) -> str:
    """`text` as one line of at most `most` characters, for a message."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


class BuddyError(ValueError):
    """Base of all errors that vllm_buddy raises on bad input."""


class BudgetError(BuddyError):
    """A compute budget outside what the model and the server allow."""


class ArtifactError(BuddyError):
    """An artifact that is missing, damaged, of a newer format or made for another base model."""


class SettingsError(BuddyError):
    """A server setting that is unknown or out of range."""


class UnsupportedError(BuddyError):
    """A model or an engine feature that cannot be combined with routing."""


class CalibrationError(BuddyError):
    """A text, a model or a setting that cannot be used to measure layer importance."""


class EmbeddedModelError(BuddyError):
    """The embedded model cannot be read from its package or written to the chosen folder."""


class ServerError(BuddyError):
    """A server that this package started did not become ready, or stopped."""


class HubError(BuddyError):
    """The Hugging Face hub does not give a repository."""


class ModelError(BuddyError):
    """A model folder that cannot be loaded."""


class BaselineError(BuddyError):
    """A static layer order that is unknown, belongs to another model or has not been measured."""


class DataError(BuddyError):
    """A data file that cannot be read or has another format."""


class EvaluationError(BuddyError):
    """Data, a policy or a setting that cannot be used to measure quality."""


class TrainingError(BuddyError):
    """A setting, data or a state with which training cannot start or continue."""


def own_error(error: Exception) -> BuddyError | None:
    """The error of this package that a validator raised, and that stands inside pydantic's; None: there is none."""
    details = error.errors() if isinstance(error, ValueError) and hasattr(error, "errors") else []
    inner = (detail.get("ctx", {}).get("error") for detail in details)
    return next((e for e in inner if isinstance(e, BuddyError)), None)
