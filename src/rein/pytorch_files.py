"""Read PyTorch's files (`.pth`, `.pt`, `.ckpt`) that may come from anyone: no code of theirs runs, and they take no more memory than
their size.

`torch.load(weights_only=True)` runs no code, but it ignores checksums, and a file of a kilobyte can make it allocate gigabytes. So
`load` first follows the file's outline with stand-ins for tensors, and refuses whatever is larger than the file.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from rein.errors import CheckpointError, one_line
from rein.files import check_regular_file, reason_of

MAX_PICKLE = 2**23  # bytes of everything in a file but tensors
_ZIP = b"PK\x03\x04"  # start of a file since PyTorch 1.6; older ones are pickles followed by tensors
_OLD_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # their first pickle, a number
_OLD_PICKLES = 5  # magic number, protocol, system, content, names of the tensors' storages


def load(path: str | os.PathLike[str]) -> Any:
    """Return the content of a file: tensors on the CPU, in dictionaries, lists and tuples with plain values.

    Raises:
        CheckpointError: the file cannot be read, is damaged, holds anything but tensors and plain values, or asks for more memory
            than its size.
    """
    try:
        check_regular_file(path)
        with open(path, "rb") as file:
            start = file.read(9)
            if not start:
                raise CheckpointError(f"{path} is empty. Restore it from a copy.")
            if start[8:] == b"{" and _size(file) > int.from_bytes(start[:8], "little"):
                raise CheckpointError(
                    f"{path} is a safetensors file, expected a PyTorch file. Load a file of rein with rein.load or "
                    "rein.Segmenter.load; the name of a file with weights of a backbone must end in .safetensors."
                )
            if start.startswith(_ZIP):
                _check_zip(file)
            else:
                _check_old(file)
        content = torch.load(path, map_location="cpu", weights_only=True)
        _check_memory(content, 2 * os.path.getsize(path))  # twice: tensors may share their memory
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason_of(error, path)}.") from error
    except Exception as error:  # zip, pickle and torch raise their own kinds
        raise CheckpointError(
            f"{path} cannot be read as a PyTorch file{f': {one_line(error)}' if ' ' in str(error) else ''}. Expected a complete file "
            "that torch.save wrote, of tensors and plain values. If you trust a file that holds more, save its state_dict alone."
        ) from error
    return content


def describe(path: str | os.PathLike[str]) -> str | None:
    """What a PyTorch file is and what to do with it, for the message of a reader of other files; None for any other file."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_OLD_START))
        if start.startswith(_ZIP):
            with zipfile.ZipFile(path) as archive, archive.open(_pickle_entry(archive)) as part:
                start = part.read(MAX_PICKLE)
        elif start != _OLD_START:
            return None
    except (OSError, ValueError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return None
    if b"pytorch-lightning_version" in start:
        writer = " of rein fit" if b"\x04\x00\x00\x00rein" in start else ""  # the key that the training task adds
        return (
            f"{path} is a Lightning checkpoint{writer}. Pass it to rein fit, test or predict with --ckpt_path and the run's "
            "config.yaml; the adapter and the head are in the run's segmenter.safetensors."
        )
    return (
        f"{path} is a PyTorch file. Convert a checkpoint of the authors with rein convert; pass weights of a backbone to rein fit "
        "with --model.weights."
    )


# -- the outline of a file


class _Storage(NamedTuple):
    """Stands for the memory of a tensor."""

    elements: int


class _StorageType(NamedTuple):
    """Stands for a class such as `torch.FloatStorage`."""

    itemsize: int


class _Dictionary(dict[Any, Any]):
    """Stands for a dictionary, for example of tensors."""

    def __init__(self) -> None: ...


class _Ignored:
    """Stands for every other object that a file may name; takes part in nothing."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# what `torch.save` writes; other operations of a pickle can allocate memory by themselves
_OPERATIONS = b"".join(
    (
        *(pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
        *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.BINGET, pickle.LONG_BINGET, pickle.BINPUT),
        *(pickle.LONG_BINPUT, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    )
)


class _Outline(pickle._Unpickler):  # in Python: the one in C allocates what a pickle asks for
    """Follows a pickle without calling or building what it names, and collects the declared size of every storage.

    Attributes:
        sizes: name of a storage -> number of bytes.
    """

    dispatch: ClassVar = {code: pickle._Unpickler.dispatch[code] for code in _OPERATIONS}

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for what the pickle names."""
        full_name = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if full_name == "collections.OrderedDict":
            return _Dictionary
        if full_name in _STORAGES:
            return _StorageType(_STORAGES[full_name])
        if full_name in ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"):
            return _check_view
        if full_name in _PLAIN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return _Ignored
        raise pickle.UnpicklingError(f"it names {full_name}, which is neither a tensor nor a plain value")

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage that a tensor names."""
        kind, storage_type, name, _, elements = pid[:5]
        if kind != "storage" or type(storage_type) is not _StorageType or type(name) is not str or type(elements) is not int:
            raise pickle.UnpicklingError("a tensor without a storage")
        if self.sizes.setdefault(name, elements * storage_type.itemsize) != elements * storage_type.itemsize or elements < 0:
            raise pickle.UnpicklingError(f"storage {name} has two sizes")
        return _Storage(elements)


# class -> bytes per number
_STORAGES = {
    **dict.fromkeys(("torch.DoubleStorage", "torch.LongStorage", "torch.ComplexFloatStorage"), 8),
    **dict.fromkeys(("torch.FloatStorage", "torch.IntStorage"), 4),
    **dict.fromkeys(("torch.HalfStorage", "torch.BFloat16Storage", "torch.ShortStorage"), 2),
    **dict.fromkeys(("torch.ByteStorage", "torch.CharStorage", "torch.BoolStorage", "torch.storage.UntypedStorage"), 1),
    "torch.ComplexDoubleStorage": 16,
}
_PLAIN = {
    *("torch._utils._rebuild_tensor_v3", "torch._utils._rebuild_parameter", "torch.Size", "torch.device"),
    "_codecs.encode",  # makes bytes
}


def _check_view(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *more: object) -> _Ignored:
    """Raise unless the tensor lies inside its storage."""
    numbers = (offset, *shape, *stride)
    if type(storage) is not _Storage or len(shape) != len(stride) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor of an invalid shape")
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if 0 not in shape and last >= storage.elements:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} is larger than its storage of {storage.elements} numbers")
    return _Ignored()


def _check_zip(file: Any) -> None:
    """Raise unless every checksum is right and every storage has the size that the pickle declares."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        names = {entry.filename.lower() for entry in entries}  # torch ignores case
        if len(names) < len(entries) or sum(entry.file_size for entry in entries) > _size(file):
            raise zipfile.BadZipFile("its parts are compressed or overlap")
        damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of its part {damaged} is wrong")
        entry = _pickle_entry(archive)
        if entry.file_size > MAX_PICKLE:
            raise pickle.UnpicklingError(f"its outline has {entry.file_size:,} bytes, expected at most {MAX_PICKLE:,}")
        outline = _Outline(io.BytesIO(archive.read(entry)))
        outline.load()
        folder = entry.filename.removesuffix("data.pkl")
        found = {entry.filename: entry.file_size for entry in entries}
        for name, size in outline.sizes.items():
            if found.get(f"{folder}data/{name}") != size:
                raise pickle.UnpicklingError(f"storage {name} has not the declared size")


def _pickle_entry(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    entries = [entry for entry in archive.infolist() if entry.filename.count("/") == 1 and entry.filename.endswith("/data.pkl")]
    if len(entries) != 1:
        raise zipfile.BadZipFile("it has no part data.pkl")
    return entries[0]


def _check_old(file: Any) -> None:
    """As `_check_zip`, for the format before PyTorch 1.6, which has no checksums."""
    file.seek(0)
    stream = io.BytesIO(file.read(MAX_PICKLE))
    sizes: dict[str, int] = {}
    for _ in range(_OLD_PICKLES):
        outline = _Outline(stream)
        outline.load()
        sizes |= outline.sizes
    if sum(sizes.values()) > _size(file):
        raise pickle.UnpicklingError("its tensors are larger than the file")


def _size(file: Any) -> int:
    return os.fstat(file.fileno()).st_size


# -- the content of a file


def _check_memory(content: Any, limit: int) -> None:
    """Raise unless all tensors are dense, on the CPU, and together no larger than `limit` bytes."""
    total = 0
    for tensor in _tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise pickle.UnpicklingError("a tensor is not dense")
        total += tensor.numel() * tensor.element_size()
    if total > limit:
        raise pickle.UnpicklingError(f"its tensors take {total:,} bytes")


def _tensors(content: Any) -> Iterator[Tensor]:
    pending, seen = [content], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            pending += value.values() if isinstance(value, Mapping) else value
