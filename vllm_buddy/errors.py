"""Every error a user can cause. Each message says what was found, what is allowed and what to do."""


class BuddyError(ValueError):
    """Base of all errors that vllm_buddy raises on bad input."""


class BudgetError(BuddyError):
    """A compute budget outside what the model and the server allow."""


class ArtifactError(BuddyError):
    """An artifact that is missing, damaged, of a newer format or made for another base model."""


class SettingsError(BuddyError):
    """A server setting that is unknown or out of range."""


class UnsupportedError(BuddyError):
    """A model or an engine feature that routing cannot be combined with."""


class CalibrationError(BuddyError):
    """A text, a model or a setting that layer importance cannot be measured with."""


class EmbeddedModelError(BuddyError):
    """The embedded model cannot be taken out of its package or written where it was asked for."""


class ServerError(BuddyError):
    """A server that this package started did not come up, or stopped."""


class ModelError(BuddyError):
    """A model folder that cannot be loaded."""


class BaselineError(BuddyError):
    """A static layer order that is unknown, belongs to another model or has not been measured."""


class DataError(BuddyError):
    """A file of text or of rows that cannot be read or is of another form."""


class EvaluationError(BuddyError):
    """Data, a policy or a setting that quality cannot be measured with."""


class TrainingError(BuddyError):
    """A setting, data or a state that training cannot go on with."""
