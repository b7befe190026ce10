"""Read and write files: writing replaces a file in one step, and reading a safetensors file from anyone takes no more memory than it.

`pytorch_files.py` reads PyTorch's files.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rein.errors import CheckpointError, one_line

MAX_HEADER = 2**21  # bytes; the header of a file with 10,000 tensors takes half of it


def replace_file(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write `content` to a temporary file beside `path`, sync it, and rename it to `path`.

    A reader sees the previous file or the new one, never a part of one, also if several processes write at once or one of them is
    killed. A symbolic link is kept and its target is replaced. An existing file keeps its mode.

    Raises:
        CheckpointError: the folder does not exist or cannot be written, the existing file is write-protected or not a regular file,
            or the disk is full. An existing file stays unchanged.
    """
    try:
        target = Path(path).resolve()
        if target.is_symlink():  # a loop; before Python 3.13, resolve refuses it
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        mode = _mode_to_replace(target)
        _remove_abandoned(target)
        with _temporary(target, 0o666 if mode is None else mode) as (descriptor, temporary):
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
            os.fsync(descriptor)
            if mode is not None:
                os.chmod(temporary, mode)  # the umask may have reduced it
            os.replace(temporary, target)
        with suppress(OSError):  # not every file system can sync a folder, and the file is whole either way
            _sync_folder(target.parent)
    except (OSError, RuntimeError, ValueError) as error:  # a loop of symbolic links, before Python 3.13; a null character
        raise CheckpointError(f"cannot write {path}: {reason_of(error, path)}.") from error


def check_regular_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless `path` is a regular file: opening a pipe would wait for a writer, and a device may never end."""
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if Path(path).exists() and not Path(path).is_file():
        raise OSError(errno.EINVAL, "it is not a regular file")


def read_text(path: str | os.PathLike[str], most: int) -> str:
    """Read a text file of at most `most` characters, so that a list of its values cannot fill the memory.

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is longer, or not UTF-8.
    """
    check_regular_file(path)
    with open(path, encoding="utf-8") as file:
        text = file.read(most + 1)
    if len(text) > most:
        raise ValueError(f"it has more than {most:,} characters")
    return text


def describe_missing(folder: Path) -> str:
    """Why a folder is not there: names the first part of its path that does not exist."""
    for part in [*reversed(folder.parents), folder]:
        if not part.exists():
            return f"{part} does not exist"
    return f"{folder} is not a folder"


def reason_of(error: Exception, path: str | os.PathLike[str]) -> str:
    """The reason why the operating system cannot read or write `path`, on one line: what is missing of it, or what it is."""
    if isinstance(error, IsADirectoryError):
        return "it is a folder; expected the path of a file"
    if isinstance(error, FileNotFoundError):
        parent = Path(path).parent
        return "no such file" if parent.is_dir() else describe_missing(parent)
    return one_line(getattr(error, "strerror", None) or error)


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata of a safetensors file. The tensors share memory with the file.

    The library opens a file twice, first for the header, then for the tensors. If another process replaces the file in between, it is
    read again.

    Raises:
        SafetensorError: the file is not a complete safetensors file, or its header is larger than `MAX_HEADER`.
        OSError: the file does not exist or cannot be read, or is replaced all the time.
    """
    for _ in range(100):
        before, result = _version_of(path), _try_to_read(path)
        if _version_of(path) == before:
            if isinstance(result, SafetensorError):
                raise result
            return result
    raise OSError(errno.EBUSY, "it is replaced all the time")


def _version_of(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """Numbers that change when the file is replaced."""
    found = os.stat(path)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _try_to_read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]] | SafetensorError:
    check_regular_file(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if MAX_HEADER < size < os.path.getsize(path):  # otherwise the library says what is wrong
        return SafetensorError(f"its header has {size:,} bytes, expected at most {MAX_HEADER:,}")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - not a dictionary
    except SafetensorError as error:
        return error


def _mode_to_replace(path: Path) -> int | None:
    """The mode of the file at `path`, or None if there is none."""
    check_regular_file(path)
    if not path.exists():
        return None
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is write-protected")
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def _temporary(path: Path, mode: int) -> Iterator[tuple[int, Path]]:
    """A new file beside `path`, open and locked; it is removed at the end if it still exists.

    The lock tells the files of running processes from those that killed processes have left.
    """
    while True:
        temporary = path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        _lock(descriptor)
        if temporary.exists():  # else another process removed it before it was locked
            break
        os.close(descriptor)
    try:
        yield descriptor, temporary
    finally:
        with suppress(OSError):
            os.unlink(temporary)
        os.close(descriptor)


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` that killed processes have left."""
    for name in glob.glob(f"{glob.escape(_prefix(path))}{'[0-9a-f]' * 16}.tmp", root_dir=path.parent):
        with suppress(OSError):
            descriptor = os.open(path.with_name(name), os.O_RDWR)
            try:
                if _lock(descriptor):
                    os.unlink(path.with_name(name))
            finally:
                os.close(descriptor)


def _prefix(path: Path) -> str:
    return f".{path.name[:100]}."  # file names are limited to 255 bytes


def _lock(descriptor: int) -> bool:
    """Lock an open file until it is closed; returns False if another process has locked it, or the system has no locks."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
