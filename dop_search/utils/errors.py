"""Errors that a user can cause, each naming the bad value and the remedy."""


class DopError(ValueError):
    """Base class of every error that dop-search raises for a user's input."""


class StrategyError(DopError):
    """A strategy is malformed, or was made for another model."""


class BudgetError(DopError):
    """A budget is out of range or infeasible; ``smallest_feasible`` says what would work."""

    def __init__(self, message: str, smallest_feasible: float | None = None) -> None:
        super().__init__(message)
        self.smallest_feasible = smallest_feasible


class UnsupportedModelError(DopError):
    """The model class has no adapter."""


class MemoryLimitError(DopError):
    """Something does not fit the memory of its device; the message says what would."""


class CheckpointError(DopError):
    """A checkpoint is missing, incomplete or damaged, or its files contradict each other."""


class CacheError(DopError):
    """A cached file is corrupt or belongs to another model, data set or configuration."""


class WriteError(CacheError):
    """A file cannot be written: the disk is full or read-only."""


class DataError(DopError):
    """A validation set is empty, or one of its samples cannot be read."""


class NumericalError(DopError):
    """A forward pass produced NaN or infinite logits."""


class MissingExtraError(DopError):
    """Something needs an extra of this package that is not installed."""


class ConfigError(DopError):
    """The composed configuration is invalid; the message lists every error with its path."""
