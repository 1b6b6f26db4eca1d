"""Read an ONNX file into plain operations and arrays, and check everything that it declares.

The declared sizes are compared with the bytes that exist before an array is made. The memory of all
arrays together is limited (``Budget``). External data are read only from regular files in the
model's own folder.
"""

import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from portacnn.errors import ModelFormatError
from portacnn.file_kinds import FIRST, kind_of
from portacnn.files import file_path
from portacnn.onnx.tensors import FLOATS as FLOATS
from portacnn.onnx.tensors import LARGEST, array_of
from portacnn.onnx.tensors import TYPES as TYPES
from portacnn.onnx.tensors import brief as brief
from portacnn.onnx.wire import METADATA, GraphProto, NodeProto, Tensor, ValueInfo, read_model
from portacnn.runtime import HostArray
from portacnn.text import quoted

OLDEST, NEWEST = 6, 28
"""The oldest and newest supported opset."""
MAX_EXTRA_BYTES = 64 << 20
"""The memory limit of arrays in bytes, in addition to a multiple of the file size."""
_LARGEST_DENOMINATOR = 64
_FILES = 4  # times the bytes of all files


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
    scope: dict[str, str] = field(default_factory=dict)  # names around it, in a branch of If

    @property
    def where(self) -> str:
        """Return the node's name and operator, such as "node 'conv1' (Conv)", for error
        messages."""
        return f"node {quoted(self.label)} ({self.kind[:80]})"

    @property
    def label(self) -> str:
        """Return the node's name, or that of its output."""
        return self.name or self.outputs[0]

    def graph(self, name: str) -> GraphProto | None:
        """Return a graph, or None."""
        return self._get(name, "g")

    def names(self) -> set[str]:
        """Return the names of all values that it uses, also in the graphs of its attributes."""
        names = {name for name in self.inputs if name}
        for kind, graph in self.attributes.values():
            if kind == "g":
                names |= {self.scope.get(name, name) for name in graph.names()}
        return names

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
        """Return a finite number: the shortest decimal or simple fraction with the file's float32
        value, 1e-05 or 1/6."""
        value = self._get(name, "f")
        if value is not None and not np.isfinite(value):
            raise self.wrong(f"attribute {name!r} is {value}")
        return default if value is None else meant(value)

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
        if len(values) != count or not all(least <= v < LARGEST for v in values):
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


def meant(value: float) -> float:
    """Return the number that was rounded to this float32: the shortest decimal, or a simple
    fraction if that has as many digits as any float32."""
    shortest = str(np.float32(value))
    if len(shortest.strip("-0.")) > 7:
        fraction = float(Fraction(value).limit_denominator(_LARGEST_DENOMINATOR))
        if np.float32(fraction) == np.float32(value):
            return fraction
    return float(shortest)


def operation(node: NodeProto) -> Operation:
    """Return a node with its attributes checked. Raises ModelFormatError."""
    attributes: dict[str, tuple[str, Any]] = {}
    made = Operation(node.name, node.op_type, node.inputs, node.outputs, attributes)
    if node.domain not in ("", "ai.onnx"):
        made.kind = f"{node.domain}.{node.op_type}"
    for attribute in node.attributes:
        kind = _KINDS.get(attribute.type) if attribute.type else next(iter(attribute.values), None)
        if "ref_attr_name" in attribute.values or kind is None:
            raise made.wrong(f"attribute {quoted(attribute.name)} has no value")
        if attribute.name in attributes:
            raise made.wrong(f"attribute {quoted(attribute.name)} occurs twice")
        value = attribute.values.get(kind, _DEFAULTS.get(kind))
        if value is None:
            raise made.wrong(f"attribute {quoted(attribute.name)} has no value")
        attributes[attribute.name] = (kind, value)
    return made


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
            return array_of(self, tensor)
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
        op = operation(node)
        for name in op.inputs:
            if name and name not in known:
                raise op.wrong(
                    f"its input {quoted(name)} is computed by a later node: the graph has a cycle "
                    "or is not sorted"
                    if name in made
                    else f"no node computes its input {quoted(name)}"
                )
        for name in op.outputs:
            if name and name in known:
                raise op.wrong(f"its output {quoted(name)} already exists")
            known.add(name)
        operations.append(op)
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


def _open_regular(path: str, flags: int) -> int:
    """Open a regular file. Pipes, which would block, and devices are not supported."""
    opened = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise ModelFormatError(
            f"external data {quoted(os.path.basename(path))} are not a regular file"
        )
    return opened
