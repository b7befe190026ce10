"""Files on the Hugging Face hub, which are named like paths: `hf://owner/name` or `hf://owner/name@revision` (extra `hub`)."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

from rein._version import __version__
from rein.errors import CheckpointError, one_line
from rein.extras import require

FILE = "model.safetensors"  # the adapter or the segmenter in a repository
_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
_ADDRESS = re.compile(rf"hf://?({_REPOSITORY})(?:@([\w./-]+))?", re.ASCII)  # pathlib takes away a slash


def is_repository(name: object) -> bool:
    """Whether a value has the form `owner/name`."""
    return isinstance(name, str) and re.fullmatch(_REPOSITORY, name, re.ASCII) is not None


def fetch(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Download the file that an address names into the hub's cache, and return its path there; any other path is returned as it is.

    Without a network, the file in the cache is used.

    Raises:
        CheckpointError: the address is invalid; there is no such repository, revision or file; or it cannot be downloaded.
        MissingExtraError: huggingface_hub is not installed.
    """
    text = os.fspath(path)
    if not isinstance(text, str) or not text.startswith("hf:/"):
        return path
    found = _ADDRESS.fullmatch(text)
    if found is None:
        raise CheckpointError(
            f"{one_line(text)} is not an address on the hub; expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION. Correct it."
        )
    hub = require("huggingface_hub", "hub")
    repository, revision = found.groups()
    try:
        with ask_hub_once():
            local: str = hub.hf_hub_download(
                repository, FILE, revision=revision, library_name="rein", library_version=__version__
            )
    except Exception as error:  # each kind of failure has a class of its own, and they change between versions
        raise CheckpointError(f"cannot load hf://{repository}: {reason_of(error, repository, revision)}") from error
    return local


def reason_of(error: Exception, repository: str, revision: str | None = None) -> str:
    """Why the hub did not do what was asked, and what to do."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "OfflineModeIsEnabled" in kinds:
        return "HF_HUB_OFFLINE is set, so nothing is sent to the hub. Unset it."
    if "GatedRepoError" in kinds:
        return f"{repository} is gated. Ask for access on its page of the hub, then run: hf auth login"
    if "RevisionNotFoundError" in kinds:
        return f"it has no revision {revision!r}; expected a branch, a tag or a commit. Correct what follows the @."
    if "LocalEntryNotFoundError" in kinds:
        return "the hub cannot be reached, and the file is not in its cache. Connect to the network, or pass a file."
    if "EntryNotFoundError" in kinds:
        return f"it has no file {FILE}, which rein.push_to_hub writes. Name a repository that it has written."
    if status in (401, 403) or "LocalTokenNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
        return f"{repository} does not exist, or you have no access to it. Check the name, or run: hf auth login"
    return f"{type(error).__name__}: {one_line((str(error).strip() or 'no reason is given').splitlines()[0]).rstrip('.')}. Try again."


@contextmanager
def ask_hub_once() -> Iterator[None]:
    """Use the download cache at once if the hub does not answer; its own client would retry for most of a minute."""
    from huggingface_hub import constants

    found = constants.HF_HUB_OFFLINE
    try:
        if not found and not getproxies():
            address = urlsplit(constants.ENDPOINT)
            socket.create_connection((address.hostname or "", address.port or 443), timeout=5).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = found
