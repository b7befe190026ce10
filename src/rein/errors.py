"""What rein raises when a user's input is wrong.

Every kind is a `ReinError` and also the builtin exception that fits, so `except ValueError` keeps working. Each message says
what was got, what was wanted and what to do.
"""


class ReinError(Exception):
    """Base of every error that rein raises on purpose."""


class InputError(ReinError, ValueError):
    """An argument, an image, a label or a data folder is not what was asked for."""


class UnsupportedBackboneError(ReinError, ValueError):
    """A fact about the backbone is missing; the message says which, and how to give it."""


class WrapError(ReinError, RuntimeError):
    """The model is already wrapped, not wrapped, or compiled before it was wrapped."""


class CheckpointError(ReinError, ValueError):
    """A file is not an adapter, is damaged, or belongs to another backbone. Nothing was changed."""


class MissingExtraError(ReinError, ImportError):
    """A feature needs an optional dependency; the message says which extra installs it."""
