"""Read an ONNX file into plain operations and arrays, and check everything that it declares.

The declared sizes are compared with the bytes that exist before an array is made. The memory of all
arrays together is limited (``Budget``). External data are read only from regular files in the
model's own folder.
"""

import os
import re
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from portacnn.errors import ModelFormatError
from portacnn.file_kinds import FIRST, kind_of
from portacnn.files import file_path
from portacnn.onnx.wire import METADATA, GraphProto, NodeProto, Tensor, ValueInfo, read_model
from portacnn.runtime import HostArray
from portacnn.text import quoted

OLDEST, NEWEST = 6, 28
"""The oldest and newest supported opset."""
MAX_EXTRA_BYTES = 64 << 20
"""The memory limit of arrays in bytes, in addition to a multiple of the file size."""
_FILES = 4  # times the bytes of all files
_LARGEST = 1 << 31  # the maximum of a size, stride or padding
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


class Budget:
    """The memory limit of all arrays together: a multiple of the file sizes, plus an extra."""

    def __init__(self, size: int, max_extra_bytes: int) -> None:
        self.left = _FILES * size + max_extra_bytes
        self._widened: set[str] = set()

    def widen(self, name: str, count: int) -> None:
        """Take ``count`` bytes for a quantized tensor as floats. The first time, the size of the
        file covers them."""
        if name and name not in self._widened:
            self._widened.add(name)
        else:
            self.take(count)

    def add_file(self, size: int) -> None:
        """Add a file of ``size`` bytes."""
        self.left += _FILES * size

    def take(self, count: int) -> None:
        """Take ``count`` bytes that will be allocated. Raises ModelFormatError if the limit is
        exceeded."""
        if count > self.left:
            raise ModelFormatError(
                f"its arrays need {count} more bytes, but only {self.left} are left of the limit "
                "for a file of this size; if you trust the file, increase the limit: load(..., "
                "max_extra_bytes=...)"
            )
        self.left -= count


# --- operations -----------------------------------------------------------------------------------

_KINDS = {
    1: "f",
    2: "i",
    3: "s",
    4: "t",
    5: "g",
    6: "floats",
    7: "ints",
    8: "strings",
    9: "tensors",
    10: "graphs",
}
_DEFAULTS: dict[str, Any] = {"f": 0.0, "i": 0, "s": "", "floats": [], "ints": [], "strings": []}


@dataclass(slots=True)
class Operation:
    """One node of the graph, with its attributes by name and kind."""

    name: str
    kind: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, tuple[str, Any]]
    asked: set[str] = field(default_factory=set)

    @property
    def where(self) -> str:
        """Return the node's name and operator, such as "node 'conv1' (Conv)", for error
        messages."""
        return f"node {quoted(self.name or self.outputs[0])} ({self.kind[:80]})"

    def wrong(self, message: str) -> ModelFormatError:
        """Return an error that names this node."""
        return ModelFormatError(message, self.where)

    def _get(self, name: str, kind: str) -> Any:
        self.asked.add(name)
        if name not in self.attributes:
            return None
        came, value = self.attributes[name]
        if came != kind:
            raise self.wrong(f"attribute {name!r} must be of the kind {kind!r}, got {came!r}")
        return value

    def has(self, name: str) -> bool:
        """Return whether there is such an attribute."""
        return name in self.attributes

    def whole(self, name: str, default: int) -> int:
        """Return a whole number."""
        value = self._get(name, "i")
        return default if value is None else value

    def real(self, name: str, default: float) -> float:
        """Return a finite number, with the shortest decimal digits of the file's float32
        (1e-05)."""
        value = self._get(name, "f")
        if value is not None and not np.isfinite(value):
            raise self.wrong(f"attribute {name!r} is {value}")
        return default if value is None else float(str(np.float32(value)))

    def word(self, name: str, default: str) -> str:
        """Return a string."""
        value = self._get(name, "s")
        return default if value is None else value

    def ints(self, name: str) -> list[int] | None:
        """Return whole numbers, or None."""
        return self._get(name, "ints")

    def sizes(self, name: str, count: int, default: int, least: int) -> list[int]:
        """Return ``count`` whole numbers that can be a shape, strides or padding."""
        values = self.ints(name)
        values = [default] * count if values is None else values
        if len(values) != count or not all(least <= v < _LARGEST for v in values):
            raise self.wrong(
                f"{name} must be {count} numbers of at least {least} and below 2^31, "
                f"got {brief(values)}"
            )
        return values

    def any_of(self, *kinds_and_names: tuple[str, str]) -> tuple[str, Any] | None:
        """Return (name, value) of the first of these attributes, (name, kind), that exists."""
        for name, kind in kinds_and_names:
            if (value := self._get(name, kind)) is not None:
                return name, value
        return None

    def ignore(self, *names: str) -> None:
        """Mark attributes as read that have no effect here."""
        self.asked.update(names)

    def check_all_asked(self) -> None:
        """Raise ModelFormatError if an attribute is unknown."""
        if unknown := sorted(set(self.attributes) - self.asked):
            raise self.wrong(f"unknown attribute {quoted(unknown[0])}")


def brief(values: Sequence[Any]) -> str:
    """Return numbers from a file as short text, for an error message."""
    return str(list(values[:16]))[:-1] + (", ...]" if len(values) > 16 else "]")


def _operation(node: NodeProto) -> Operation:
    attributes: dict[str, tuple[str, Any]] = {}
    operation = Operation(node.name, node.op_type, node.inputs, node.outputs, attributes)
    if node.domain not in ("", "ai.onnx"):
        operation.kind = f"{node.domain}.{node.op_type}"
    for attribute in node.attributes:
        kind = _KINDS.get(attribute.type) if attribute.type else next(iter(attribute.values), None)
        if "ref_attr_name" in attribute.values or kind is None:
            raise operation.wrong(f"attribute {quoted(attribute.name)} has no value")
        if attribute.name in attributes:
            raise operation.wrong(f"attribute {quoted(attribute.name)} occurs twice")
        value = attribute.values.get(kind, _DEFAULTS.get(kind))
        if value is None:
            raise operation.wrong(f"attribute {quoted(attribute.name)} has no value")
        attributes[attribute.name] = (kind, value)
    return operation


# --- the file -------------------------------------------------------------------------------------


@dataclass
class Source:
    """A checked file, in which all references by name are valid. Arrays are made on request.

    Files of external data stay open until the end of the ``with`` block. So all reads are from the
    same file, even if it is renamed or replaced meanwhile.
    """

    path: Path
    budget: Budget
    opset: int
    operations: list[Operation]
    initializers: dict[str, Tensor]
    inputs: dict[str, ValueInfo]
    outputs: list[str]
    metadata: str | None = None  # portacnn's own
    _files: dict[str, IO[bytes]] = field(default_factory=dict)
    _counted: set[tuple[int, int]] = field(default_factory=set)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def external(self, location: str) -> IO[bytes]:
        """Open the file with a tensor's external data, and add its size to the budget.

        The file must be in the model's folder or, if the model is a link, in its target's folder.
        It may be a link to a file in one of these folders.

        Raises:
            ModelFormatError: the file is in another folder.
            OSError: it cannot be opened.
        """
        name = os.path.normpath(location)
        if name not in self._files:
            self._files[name] = file = self._open.enter_context(self._opened(location))
            status = os.fstat(file.fileno())
            # once per file, which may have several names
            if (status.st_dev, status.st_ino) not in self._counted:
                self._counted.add((status.st_dev, status.st_ino))
                self.budget.add_file(status.st_size)
        return self._files[name]

    def close(self, location: str) -> None:
        """Close a file of external data that was read completely.

        Models with one file per tensor may exceed the limit of open files.
        """
        self._files.pop(os.path.normpath(location)).close()

    def _opened(self, location: str) -> IO[bytes]:
        beside = [
            os.path.dirname(os.path.abspath(self.path)),
            os.path.dirname(os.path.realpath(self.path)),
        ]
        inside = tuple(os.path.join(os.path.realpath(folder), "") for folder in beside)
        paths = [os.path.join(folder, location) for folder in beside]
        path = os.path.realpath(next(filter(os.path.lexists, paths), paths[0]))
        if os.path.isabs(location) or ".." in location.split("/") or not path.startswith(inside):
            raise ModelFormatError(
                f"its external data {quoted(location)} are outside the model's folder; only files "
                "inside it are read"
            )
        return open(path, "rb", buffering=0, opener=_open_regular)

    def array(self, tensor: Tensor) -> HostArray:
        """Return a tensor as a read-only array, which may share memory with the file's bytes.

        Raises:
            ModelFormatError: if its shape does not match its bytes, its type is not numeric, or its
                external data are unavailable.
        """
        where = f"tensor {quoted(tensor.name)}"
        try:
            return _array(self, tensor)
        except ModelFormatError as error:
            raise error.at(where)


def read_source(path: str | os.PathLike[str], max_extra_bytes: int = MAX_EXTRA_BYTES) -> Source:
    """Read and check a file. Raises ModelFormatError, or OSError if it cannot be read."""
    path = file_path(path, "an ONNX file")
    content = path.read_bytes()
    try:
        model = read_model(memoryview(content))
        if model.graph is None:
            raise ModelFormatError("it is not an ONNX model: it has no graph")
    except ModelFormatError as error:
        kind = kind_of(content[:FIRST])
        if kind is None or "ONNX" in kind:
            raise
        raise ModelFormatError(f"{error.message}; it looks like {kind}") from None
    if model.functions:
        raise ModelFormatError(
            "it defines functions; inline them first: onnx.inliner.inline_local_functions"
        )
    if model.graph.sparse:
        raise ModelFormatError("sparse initializers are not supported")
    versions = sorted({version for domain, version in model.opsets if domain in ("", "ai.onnx")})
    if len(versions) != 1:
        raise ModelFormatError(f"expected one opset of ONNX's operators, got {brief(versions)}")
    if not OLDEST <= versions[0] <= NEWEST:
        raise ModelFormatError(
            f"it uses opset {versions[0]}, but this version reads {OLDEST}..{NEWEST}; convert it "
            "with onnx.version_converter.convert_version, or upgrade portacnn"
        )
    inputs, initializers, operations = _checked(model.graph)
    return Source(
        path,
        Budget(len(content), max_extra_bytes),
        versions[0],
        operations,
        initializers,
        inputs,
        [value.name for value in model.graph.outputs],
        model.metadata.get(METADATA),
    )


def _checked(graph: GraphProto) -> tuple[dict[str, ValueInfo], dict[str, Tensor], list[Operation]]:
    """Return inputs, initializers and operations by name, after checking that names are unique and
    ordered."""
    inputs = _by_name("inputs", graph.inputs)
    initializers = _by_name("initializers", graph.initializers)
    known = {*inputs, *initializers}
    made = {name for node in graph.nodes for name in node.outputs}
    operations = []
    for node in graph.nodes:
        operation = _operation(node)
        for name in operation.inputs:
            if name and name not in known:
                raise operation.wrong(
                    f"its input {quoted(name)} is computed by a later node: the graph has a cycle "
                    "or is not sorted"
                    if name in made
                    else f"no node computes its input {quoted(name)}"
                )
        for name in operation.outputs:
            if name and name in known:
                raise operation.wrong(f"its output {quoted(name)} already exists")
            known.add(name)
        operations.append(operation)
    known.discard("")
    if not graph.outputs:
        raise ModelFormatError("the graph has no output")
    for value in graph.outputs:
        if value.name not in known:
            raise ModelFormatError(f"no node computes the graph's output {quoted(value.name)}")
    return (
        {name: value for name, value in inputs.items() if name not in initializers},
        initializers,
        operations,
    )


def _by_name(what: str, rows: Sequence[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        if not row.name or row.name in found:
            raise ModelFormatError(
                f"there are two {what} called {quoted(row.name)}, or one without a name"
            )
        found[row.name] = row
    return found


# --- tensors --------------------------------------------------------------------------------------


def _array(source: Source, tensor: Tensor) -> HostArray:
    kind = TYPES.get(tensor.data_type)
    if kind is None:
        raise ModelFormatError(
            f"its data type {tensor.data_type} is not supported; supported are: "
            f"{', '.join(t.name for t in TYPES.values())}"
        )
    dims = tuple(tensor.dims)
    if any(not 0 <= n < _LARGEST for n in dims) or prod(n or 1 for n in dims) > _MOST_NUMBERS:
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
    source: Source, chunks: list[memoryview], count: int, dims: Sequence[int], kind: _Type
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


def _external(source: Source, tensor: Tensor, count: int, dtype: Any) -> HostArray:
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
        while left and (got := file.readinto(left)):  # type: ignore[attr-defined]
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


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file. Pipes, which would block, and devices are not supported."""
    opened = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ModelFormatError(
            f"external data {quoted(os.path.basename(path))} are not a regular file"
        )
    return opened
