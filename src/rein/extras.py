"""Import optional dependencies at the point of use."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from rein.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtraError: the module is not installed; the message says which extra installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs {module.partition('.')[0]}, which is not installed; run: pip install 'rein-adapter[{extra}]'"
        ) from error
