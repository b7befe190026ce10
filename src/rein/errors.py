"""Exceptions that rein raises for wrong input.

Every class is a `ReinError` and also a builtin exception, so `except ValueError` works. A message says what is wrong, what was
expected and what to do.
"""


class ReinError(Exception):
    """Base class of all errors that rein raises."""


class InputError(ReinError, ValueError):
    """An argument, an image, a label or a data folder is invalid."""


class UnsupportedBackboneError(ReinError, ValueError):
    """A fact about the backbone is missing; the message says which one and how to pass it."""


class WrapError(ReinError, RuntimeError):
    """The model is already wrapped, not wrapped, or compiled before it was wrapped."""


class CheckpointError(ReinError, ValueError):
    """A file is not a checkpoint of rein, is damaged, or does not fit the model. The model is unchanged."""


class MissingExtraError(ReinError, ImportError):
    """An optional dependency is not installed; the message says which extra installs it."""
