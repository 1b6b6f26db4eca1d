"""Read and write IDX, the file format of MNIST: a big-endian array after a header with type and
shape.

    offset  size    meaning
    0       2       zero
    2       1       element type, see below
    3       1       R, the rank
    4       4 * R   R dimensions, unsigned, big-endian
    4+4R    ...     the elements in C order, big-endian; nothing follows

A file may be gzipped as a whole. The reader trusts no claim of a file: it allocates memory only as
bytes arrive, so neither a huge header nor a gzip bomb takes more memory than the data that exists.
"""

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from portacnn.errors import ArrayError, DataFormatError, ShapeError
from portacnn.file_kinds import FIRST, kind_of
from portacnn.files import write_atomically

_TYPES: dict[int, np.dtype[Any]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_MAX_RANK = 8
_GZIP_MAGIC = b"\x1f\x8b"
_CHUNK = 1 << 20

MAX_BYTES = 1 << 31
"""Largest array, in bytes, that is read by default. All of EMNIST takes a quarter of it."""


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def read_idx(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> NDArray[Any]:
    """Return the array in an IDX file, gzipped or not; the content decides that, not the name.

        >>> import numpy as np, os, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "labels.gz")
        ...     write_idx(path, np.array([3, 1], "uint8"))
        ...     read_idx(path)
        array([3, 1], dtype=uint8)

    Args:
        path: of the file.
        max_bytes: the largest array, in bytes, to accept.

    Returns:
        An array of the shape and dtype that the file declares (uint8, int8, int16, int32, float32
        or float64, rank 1 to 8), native-endian, C-contiguous, writable.

    Raises:
        FileNotFoundError: if there is no such file (``open`` may raise other kinds of OSError).
        DataFormatError: if the file is not IDX, is truncated, has bytes after its end, is a broken
            gzip, or declares more than ``max_bytes`` bytes of elements.
    """
    with open(path, "rb") as file:
        return parse_idx(file, os.fspath(path), max_bytes=max_bytes)


def parse_idx(file: IO[bytes], name: str, *, max_bytes: int = MAX_BYTES) -> NDArray[Any]:
    """Return the array in an open, seekable binary file, as ``read_idx`` does.

    Args:
        name: the file's name, for error messages.
    """
    start = file.read(len(_GZIP_MAGIC))
    file.seek(0)
    if start != _GZIP_MAGIC:
        return _parse(file, name, max_bytes)
    try:
        with gzip.GzipFile(fileobj=file) as unpacked:
            return _parse(unpacked, name, max_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataFormatError(
            f"{name}: expected a whole gzip file, but it is cut short or damaged ({error})"
        ) from error


def _parse(stream: _Readable, name: str, max_bytes: int) -> NDArray[Any]:
    magic = _read_up_to(stream, 4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        kind = kind_of(bytes(magic + _read_up_to(stream, FIRST - len(magic))))
        raise DataFormatError(
            f"{name}: expected an IDX file, which starts with two zero bytes, a type and a rank; "
            f"got {bytes(magic)!r}{' and the end of the file' if len(magic) < 4 else ''}"
            f"{f': it looks like {kind}' if kind else ''}"
        )
    code, rank = magic[2:]
    if code not in _TYPES:
        known = ", ".join(f"0x{known:02x}" for known in _TYPES)
        raise DataFormatError(
            f"{name}: expected one of the IDX type codes {known}; got 0x{code:02x}"
        )
    if not 1 <= rank <= _MAX_RANK:
        raise DataFormatError(f"{name}: expected a rank of 1 to {_MAX_RANK}; got {rank}")

    header = _read_up_to(stream, 4 * rank)
    if len(header) < 4 * rank:
        raise DataFormatError(
            f"{name}: expected {rank} dimensions in {4 * rank} bytes; got {len(header)} bytes"
        )
    shape = struct.unpack(f">{rank}I", header)
    dtype = _TYPES[code]
    declared = f"{' x '.join(map(str, shape))} elements of {dtype.name}"

    # A dimension of 0 makes the data empty, but the others still count: NumPy cannot hold
    # (0, 2**31, 2**31) either.
    if math.prod(max(extent, 1) for extent in shape) * dtype.itemsize > max_bytes:
        raise DataFormatError(
            f"{name}: expected at most {max_bytes} bytes of elements; the header declares "
            f"{declared} "
            "(if that is right, allow it: max_bytes=...)"
        )
    size = math.prod(shape) * dtype.itemsize
    data = _read_up_to(stream, size)
    if len(data) < size:
        raise DataFormatError(
            f"{name}: expected {declared}, {size} bytes; got {len(data)} bytes: the file is cut "
            "short"
        )
    # for gzip, reading the end also verifies the checksum
    if stream.read(1):
        raise DataFormatError(
            f"{name}: expected the end of the file after {declared}; more bytes follow"
        )
    array: NDArray[Any] = np.ndarray(shape, dtype, buffer=data)
    return array.astype(dtype.newbyteorder("="), copy=False)


def _read_up_to(stream: _Readable, count: int) -> bytearray:
    """Return the next ``count`` bytes, or fewer at the stream's end; memory grows only as bytes
    arrive."""
    data = bytearray()
    while len(data) < count:
        part = stream.read(min(count - len(data), _CHUNK))
        if not part:
            break
        data += part
    return data


def write_idx(path: str | os.PathLike[str], array: NDArray[Any]) -> None:
    """Write an array as an IDX file, gzipped if the name ends in ``.gz``.

    The same array always results in the same file: the gzip header has no time and no name. The
    file is written atomically.

    Args:
        path: of the file.
        array: uint8, int8, int16, int32, float32 or float64 in any byte order, rank 1 to 8.

    Raises:
        ArrayError: if IDX has no such element type (bool, int64 and float16, for example).
        ShapeError: if the rank is 0 or above 8, or a dimension is 2**32 or more.
        OSError: if the file cannot be written.
    """
    array = np.asarray(array)
    big_endian = array.dtype.newbyteorder(">")
    code = next((code for code, dtype in _TYPES.items() if dtype == big_endian), None)
    if code is None:
        known = ", ".join(dtype.name for dtype in _TYPES.values())
        raise ArrayError(
            f"{os.fspath(path)}: expected an array of {known}, which IDX can hold; "
            f"got {array.dtype}"
        )
    if not 1 <= array.ndim <= _MAX_RANK or max(array.shape) >= 1 << 32:
        raise ShapeError(
            f"{os.fspath(path)}: expected rank 1 to {_MAX_RANK} and dimensions below 2**32; got "
            f"shape {array.shape}"
        )
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(big_endian, copy=False).tobytes()
    if Path(path).suffix.lower() == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(
            filename="", mode="wb", compresslevel=9, fileobj=packed, mtime=0
        ) as file:
            file.write(content)
        content = packed.getvalue()
    write_atomically(path, content)
