"""Exceptions that rein raises for wrong input.

Every class is a `ReinError` and also a builtin exception, so `except ValueError` works. A message says what is wrong, what was
expected and what to do.
"""


class ReinError(Exception):
    """Base class of all errors that rein raises. A long value that a message quotes is cut, so that the message stays readable."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(_shorten(each) if isinstance(each, str) else each for each in arguments))


class InputError(ReinError, ValueError):
    """An argument, an image, a label or a data folder is invalid."""


class DivergedError(InputError):
    """The loss is NaN or infinite in training."""


class UnsupportedBackboneError(ReinError, ValueError):
    """A fact about the backbone is missing; the message says which one and how to pass it."""


class WrapError(ReinError, RuntimeError):
    """The model is already wrapped, not wrapped, or compiled before it was wrapped."""


class CheckpointError(ReinError, ValueError):
    """A file is not a checkpoint of rein, is damaged, or does not fit the model. The model is unchanged."""


class MissingExtraError(ReinError, ImportError):
    """An optional dependency is not installed; the message says which extra installs it."""


def _shorten(message: str, limit: int = 4000) -> str:
    """A message of at most about `limit` characters: its start, and its end, where the remedy is."""
    return message if len(message) <= limit else f"{message[: limit - 1000]} ... {message[-1000:]}"


def one_line(value: object, limit: int = 300) -> str:
    """The text of `value` for a message: on one line, without control characters, and cut after `limit` characters."""
    words = " ".join(str(value)[: 10 * limit].split())
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in words)
    return text if len(text) <= limit else f"{text[:limit]}..."
