"""Read the numbers of a MATLAB file of version 5 to 7, as GTA's publisher packs the splits. `scipy.io` crashes on damaged files.

Format: "MAT-File Format", MathWorks, chapter 1. A file is a header of 128 bytes and a sequence of elements: type, size and content.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from rein.files import check_regular_file

_MAX_SIZE = 2**24  # bytes of the file, and of each of its matrices; GTA's file has less than 100 KB
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}  # type -> numpy's name
_MATRIX, _COMPRESSED = 14, 15


def read_matrices(path: Path) -> dict[str, np.ndarray]:
    """The numeric matrices of a file by name, each as a vector (N,).

    Raises:
        OSError: the file does not exist or cannot be read.
        ValueError: it is not a MATLAB file of version 5 to 7, or it is damaged.
    """
    check_regular_file(path)
    with path.open("rb") as file:
        content = file.read(_MAX_SIZE + 1)
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None or len(content) > _MAX_SIZE:
        raise ValueError("it is not a MATLAB file of version 5 to 7")
    found = {}
    for kind, data in _elements(content[128:], order):
        if kind == _COMPRESSED:
            unpacked = _unpack(data)
            kind, data = next(_elements(unpacked, order), (0, b""))
        if kind == _MATRIX:
            # array flags, sizes, name, real part
            parts = list(_elements(data, order))
            if len(parts) >= 4 and parts[3][0] in _NUMBERS:
                numbers = np.frombuffer(parts[3][1], order + _NUMBERS[parts[3][0]])
                found[parts[2][1].decode("ascii")] = numbers
    return found


def _elements(content: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Type and content of each element."""
    start = 0
    while start + 8 <= len(content):
        kind, size = struct.unpack_from(f"{order}II", content, start)
        if kind >> 16:  # size and content share the place of the size
            kind, size, begin, end = kind & 0xFFFF, kind >> 16, start + 4, start + 8
        else:
            begin = start + 8
            end = begin + size if kind == _COMPRESSED else begin + -(-size // 8) * 8  # padded to 8 bytes
        if size > end - begin or begin + size > len(content):
            raise ValueError("an element is longer than the file")
        yield kind, content[begin : begin + size]
        start = end


def _unpack(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        content = unpacker.decompress(data, _MAX_SIZE)
    except zlib.error as error:
        raise ValueError(f"a part cannot be unpacked: {error}") from error
    if not unpacker.eof:
        raise ValueError("a part is incomplete or too large")
    return content
