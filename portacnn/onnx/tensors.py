"""Make arrays of the tensors in an ONNX file. All sizes are compared with the bytes that exist."""

import os
import re
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.errors import ModelFormatError
from portacnn.onnx.wire import Tensor
from portacnn.runtime import HostArray
from portacnn.text import quoted

LARGEST = 1 << 31
"""The limit of a size, stride or padding."""
_MOST_NUMBERS = 1 << 40


class _Type(NamedTuple):
    """How a data type of ONNX is stored, and the field of its elements when they are not in
    raw_data."""

    name: str
    dtype: str
    place: str


TYPES = {
    1: _Type("float", "<f4", "float"),
    2: _Type("uint8", "u1", "int32"),
    3: _Type("int8", "i1", "int32"),
    4: _Type("uint16", "<u2", "int32"),
    5: _Type("int16", "<i2", "int32"),
    6: _Type("int32", "<i4", "int32"),
    7: _Type("int64", "<i8", "int64"),
    9: _Type("bool", "u1", "int32"),
    10: _Type("float16", "<u2", "int32"),
    11: _Type("double", "<f8", "double"),
    12: _Type("uint32", "<u4", "uint64"),
    13: _Type("uint64", "<u8", "uint64"),
    16: _Type("bfloat16", "<u2", "int32"),
}
FLOATS = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
"""The data types that a network's values may have."""


def brief(values: Sequence[Any]) -> str:
    """Return numbers from a file as short text, for an error message."""
    return str(list(values[:16]))[:-1] + (", ...]" if len(values) > 16 else "]")


def array_of(source: Any, tensor: Tensor) -> HostArray:
    """Return a tensor of a ``Source`` as a read-only array. Raises ModelFormatError."""
    kind = TYPES.get(tensor.data_type)
    if kind is None:
        raise ModelFormatError(
            f"its data type {tensor.data_type} is not supported; supported are: "
            f"{', '.join(t.name for t in TYPES.values())}"
        )
    dims = tuple(tensor.dims)
    if any(not 0 <= n < LARGEST for n in dims) or prod(n or 1 for n in dims) > _MOST_NUMBERS:
        raise ModelFormatError(f"its shape {brief(dims)} is invalid")
    count, dtype = prod(dims), np.dtype(kind.dtype)
    places = [place for place, chunks in tensor.packed.items() if any(map(len, chunks))]
    if len(places) + (tensor.raw is not None) + tensor.is_external > 1 or any(
        p != kind.place for p in places
    ):
        raise ModelFormatError(f"its {kind.name} elements are in the wrong field, or in two fields")
    if tensor.is_external:
        flat = _external(source, tensor, count, dtype)
    elif tensor.raw is not None:
        _expect(len(tensor.raw), count * dtype.itemsize, dims, kind)
        flat = np.frombuffer(tensor.raw, dtype)
    else:
        flat = _from_packed(source, tensor.packed.get(kind.place, []), count, dims, kind)
    if kind.name == "bool":
        return (flat != 0).reshape(dims)
    if kind.name == "float16":
        return flat.view("<f2").reshape(dims)
    if kind.name == "bfloat16":  # the upper 16 bits of a float32
        source.budget.take(4 * count)
        return (flat.astype("<u4") << np.uint32(16)).view("<f4").reshape(dims)
    return flat.reshape(dims)


def _expect(got: int, expected: int, dims: Sequence[int], kind: _Type) -> None:
    if got != expected:
        raise ModelFormatError(
            f"{kind.name} of shape {brief(dims)} takes {expected} bytes, but there are {got}: the "
            "file is truncated or damaged"
        )


def _from_packed(
    source: Any, chunks: list[memoryview], count: int, dims: Sequence[int], kind: _Type
) -> HostArray:
    size, dtype = sum(map(len, chunks)), np.dtype(kind.dtype)
    if kind.place in ("float", "double"):
        _expect(size, count * dtype.itemsize, dims, kind)
        return np.frombuffer(chunks[0] if len(chunks) == 1 else b"".join(chunks), dtype)
    if not count <= size <= 10 * count:  # a number takes 1 to 10 bytes
        raise ModelFormatError(f"{kind.name} of shape {brief(dims)} does not fit in {size} bytes")
    source.budget.take(count * dtype.itemsize)
    return _varints(np.frombuffer(b"".join(chunks), np.uint8), count, dtype)


_BLOCK = 1 << 16


def _varints(content: HostArray, count: int, dtype: Any) -> HostArray:
    """Return ``count`` numbers in 7-bit groups, decoded a block of bytes at a time."""
    numbers = np.empty(count, dtype)
    at = done = 0
    while at < len(content):
        block = content[at : at + _BLOCK]
        ends = np.flatnonzero(block < 0x80)
        if not len(ends):
            break
        starts = np.concatenate(([0], ends[:-1] + 1))
        lengths = ends - starts + 1
        if lengths.max() > 10 or done + len(ends) > count:
            break
        values = np.zeros(len(ends), np.uint64)
        for group in range(int(lengths.max())):
            there = lengths > group
            values[there] |= (block[starts[there] + group] & np.uint8(0x7F)).astype(
                np.uint64
            ) << np.uint64(7 * group)
        numbers[done : done + len(ends)] = values.astype(dtype)
        at, done = at + int(ends[-1]) + 1, done + len(ends)
    if at != len(content) or done != count:
        raise ModelFormatError(
            f"expected {count} elements, got more or fewer: the file is truncated or damaged"
        )
    return numbers


def _external(source: Any, tensor: Tensor, count: int, dtype: Any) -> HostArray:
    """Return elements from another file in the model's folder."""
    given = tensor.external
    unknown = set(given) - {"location", "offset", "length", "checksum", "basepath"}
    location, offset, length = (
        given.get("location", ""),
        given.get("offset", "0"),
        given.get("length"),
    )
    if unknown or not location or "\0" in location or "\\" in location or not _number(offset):
        raise ModelFormatError(f"its external data {quoted(location)} are not described correctly")
    size = count * dtype.itemsize
    if length is not None and (not _number(length) or int(length) != size):
        raise ModelFormatError(
            f"its external data have length {quoted(length)}, but its shape takes {size} bytes"
        )
    try:
        file = source.external(location)
        there = os.fstat(file.fileno()).st_size
        if int(offset) + size > there:
            raise ModelFormatError(
                f"its external data {quoted(location)} are truncated: expected "
                f"{int(offset) + size} bytes, got {there}"
            )
        source.budget.take(size)
        numbers = np.empty(count, dtype)
        file.seek(int(offset))
        left = numbers.data.cast("B") if size else memoryview(b"")
        while left and (got := file.readinto(left)):
            left = left[got:]
    except OSError as error:
        raise ModelFormatError(
            f"its external data {quoted(location)} cannot be read: {error.strerror}"
        ) from error
    if left:
        raise ModelFormatError(f"its external data {quoted(location)} are truncated")
    if size == there:
        source.close(location)
    return numbers


def _number(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,18}", text, re.ASCII) is not None
