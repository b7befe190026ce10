"""Progress bars with the time left, on a terminal; nothing in a log."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def bar(things: Any, desc: str) -> Any:
    """Go through `things` under a bar called `desc`."""
    return tqdm(things, desc=desc, leave=False, disable=None)
