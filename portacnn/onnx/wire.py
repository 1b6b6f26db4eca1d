"""Parse ONNX files, which are protocol buffers, field by field into plain Python objects.

Files are not trusted. This reader needs no schema compiler and reads only the fields in the tables
below. Bytes are not copied until a tensor is requested, every length is checked against the bytes
that exist, and the number of objects in a file is limited (``MOST``). So a small file cannot use
much memory.

A message is a sequence of fields. Each starts with a key, field * 8 + kind. The kind is the
encoding of the value: 0 a number in 7-bit groups ("varint"), 1 eight bytes, 2 a length and that
many bytes (text, a message, packed numbers), 5 four bytes. Field numbers are those of onnx.proto.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from struct import unpack
from typing import Any

from portacnn.errors import ModelFormatError

MOST = 400_000
"""The maximum number of objects in one file. A field or a list element counts 1, a message
``_MESSAGE`` more."""
_MESSAGE = 10
METADATA = "portacnn"
"""The key of portacnn's entry in a file's metadata."""
LONGEST_METADATA = 32 << 20  # bytes
LONGEST_NAME = 4096  # bytes
_MOST_AXES = 16
_DEEPEST = 8  # graphs in attributes of nodes of graphs


@dataclass(slots=True)
class Tensor:
    """A tensor as declared, with its elements as bytes. ``portacnn.onnx.reading`` checks them and
    makes the array."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    raw: memoryview | None = None
    packed: dict[str, list[memoryview]] = field(
        default_factory=dict
    )  # "float", "int32", ...: the contents of <kind>_data
    external: dict[str, str] = field(default_factory=dict)
    is_external: bool = False


@dataclass(slots=True)
class Attribute:
    """One attribute of a node, with the value of its declared type."""

    name: str = ""
    type: int = 0
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class NodeProto:
    """An operation: its operator, and the names of its inputs and outputs."""

    name: str = ""
    op_type: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: list[Attribute] = field(default_factory=list)


@dataclass(slots=True)
class ValueInfo:
    """An input or output of the graph. A dimension is a number, or None if the file does not state
    it.

    Without a shape, dims is None.
    """

    name: str = ""
    elem_type: int = 0
    dims: list[int | None] | None = None


@dataclass(slots=True)
class GraphProto:
    """The graph: nodes in the order in which they run."""

    name: str = ""
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[Tensor] = field(default_factory=list)
    inputs: list[ValueInfo] = field(default_factory=list)
    outputs: list[ValueInfo] = field(default_factory=list)
    sparse: int = 0

    def names(self) -> set[str]:
        """Return the names of all values that the nodes use, and of the outputs."""
        names = {value.name for value in self.outputs}
        for node in self.nodes:
            names.update(node.inputs)
            for attribute in node.attributes:
                if isinstance(graph := attribute.values.get("g"), GraphProto):
                    names |= graph.names()
        return names


@dataclass(slots=True)
class ModelProto:
    """A whole file."""

    ir_version: int = 0
    opsets: list[tuple[str, int]] = field(default_factory=list)
    graph: GraphProto | None = None
    functions: int = 0
    metadata: dict[str, str] = field(default_factory=dict)  # of portacnn's own key


def read_model(content: memoryview) -> ModelProto:
    """Return the model in these bytes. Raises ModelFormatError if they are not a model."""
    return _Reader().model(content)


def _wrong(what: str) -> ModelFormatError:
    return ModelFormatError(f"not a whole ONNX file: {what}")


def varint(content: memoryview, at: int) -> tuple[int, int]:
    """Return the unsigned number at this offset, and the offset after it."""
    value = shift = 0
    end = len(content)
    while True:
        if at >= end or shift > 63:
            raise _wrong("a number is truncated or too long")
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at


def signed(value: int) -> int:
    """Return the int64 that a varint represents."""
    return value - (1 << 64) if value >= 1 << 63 else value


def fields(content: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Yield (field, kind, value) of a message in order: unsigned bits for the kinds 0, 1 and 5,
    bytes for 2."""
    at, end = 0, len(content)
    while at < end:
        key, at = varint(content, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise _wrong("a field has number 0")
        value: Any
        if kind == 0:
            value, at = varint(content, at)
        elif kind == 2:
            length, at = varint(content, at)
            value, at = content[at : at + length] if length <= end - at else None, at + length
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
            value = (
                int.from_bytes(content[at : at + length], "little") if length <= end - at else None
            )
            at += length
        else:
            raise _wrong(f"a field of the unknown kind {kind}")
        if value is None:
            raise _wrong("a field extends beyond the end")
        yield number, kind, value


_PACKED = {4: ("float", 5), 5: ("int32", 0), 7: ("int64", 0), 10: ("double", 1), 11: ("uint64", 0)}
_SIZES = {1: 8, 5: 4}  # bytes of one number, by kind
_Table = dict[int, tuple[tuple[int, ...], Callable[[Any], None]]]


class _Reader:
    """Read one file and count its objects. Graphs nest in the attributes of If."""

    def __init__(self) -> None:
        self.left, self.depth = MOST, 0

    def _count(self, pieces: int = 1) -> None:
        self.left -= pieces
        if self.left < 0:
            raise ModelFormatError(f"it consists of more than {MOST} objects, the limit")

    def _message(self, what: str, content: memoryview, into: Any, table: _Table) -> Any:
        """Read a message with a table: field -> (kinds, setter of its value). Other fields are
        skipped."""
        self._count(_MESSAGE)
        for number, kind, value in fields(content):
            self._count()
            if number in table:
                kinds, take = table[number]
                if kind not in kinds:
                    raise _wrong(f"field {number} of {what} is of kind {kind}, not {kinds[0]}")
                take(value)
        return into

    def _text(self, content: memoryview) -> str:
        if len(content) > LONGEST_NAME:
            raise ModelFormatError(f"a name has {len(content)} bytes; the limit is {LONGEST_NAME}")
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError:
            raise _wrong("a name is not UTF-8") from None

    def _numbers(self, value: Any, kind: int) -> Iterator[int]:
        """Return one number, or several packed numbers, as bits."""
        if isinstance(value, int):
            yield value
            return
        at, end = 0, len(value)
        while at < end:
            self._count()
            if kind == 0:
                number, at = varint(value, at)
            else:
                if end - at < _SIZES[kind]:
                    raise _wrong("a list of numbers is truncated")
                number, at = (
                    int.from_bytes(value[at : at + _SIZES[kind]], "little"),
                    at + _SIZES[kind],
                )
            yield number

    # --- the messages of onnx.proto ---------------------------------------------------------------

    def model(self, content: memoryview) -> ModelProto:
        """Read a ModelProto."""
        model = ModelProto()

        def graph(value: memoryview) -> None:
            if model.graph is not None:
                raise _wrong("there are two graphs")
            model.graph = self.graph(value)

        def function(value: memoryview) -> None:
            model.functions += 1

        def entry(value: memoryview) -> None:
            found: dict[str, Any] = {"key": b"", "value": b""}
            table: _Table = {
                1: ((2,), _at(found, "key", memoryview)),
                2: ((2,), _at(found, "value", memoryview)),
            }
            self._message("an entry", value, found, table)
            if found["key"] != METADATA.encode():
                return
            if len(found["value"]) > LONGEST_METADATA:
                raise ModelFormatError(
                    f"its metadata have {len(found['value'])} bytes; the limit is "
                    f"{LONGEST_METADATA}"
                )
            try:
                model.metadata[METADATA] = str(found["value"], "utf-8")
            except UnicodeDecodeError:
                raise _wrong("its metadata are not UTF-8") from None

        return self._message(
            "the model",
            content,
            model,
            {
                1: ((0,), _to(model, "ir_version", signed)),
                7: ((2,), graph),
                8: ((2,), _onto(model.opsets, self.opset)),
                14: ((2,), entry),
                25: ((2,), function),
            },
        )

    def opset(self, content: memoryview) -> tuple[str, int]:
        """Read an OperatorSetIdProto."""
        found: dict[str, Any] = {"domain": "", "version": 0}
        self._message(
            "an opset",
            content,
            found,
            {1: ((2,), _at(found, "domain", self._text)), 2: ((0,), _at(found, "version", signed))},
        )
        return found["domain"], found["version"]

    def graph(self, content: memoryview) -> GraphProto:
        """Read a GraphProto."""
        if self.depth == _DEEPEST:
            raise ModelFormatError(f"its graphs nest more than {_DEEPEST} levels deep")
        self.depth += 1
        try:
            return self._graph(content)
        finally:
            self.depth -= 1

    def _graph(self, content: memoryview) -> GraphProto:
        graph = GraphProto()

        def sparse(value: memoryview) -> None:
            graph.sparse += 1

        return self._message(
            "the graph",
            content,
            graph,
            {
                1: ((2,), _onto(graph.nodes, self.node)),
                5: ((2,), _onto(graph.initializers, self.tensor)),
                11: ((2,), _onto(graph.inputs, self.value_info)),
                12: ((2,), _onto(graph.outputs, self.value_info)),
                15: ((2,), sparse),
            },
        )

    def node(self, content: memoryview) -> NodeProto:
        """Read a NodeProto."""
        node = NodeProto()
        self._message(
            "a node",
            content,
            node,
            {
                1: ((2,), _onto(node.inputs, self._text)),
                2: ((2,), _onto(node.outputs, self._text)),
                3: ((2,), _to(node, "name", self._text)),
                4: ((2,), _to(node, "op_type", self._text)),
                5: ((2,), _onto(node.attributes, self.attribute)),
                7: ((2,), _to(node, "domain", self._text)),
            },
        )
        if not node.op_type or not node.outputs:
            raise ModelFormatError(f"the node {node.name!r} has no operator or no outputs")
        return node

    def attribute(self, content: memoryview) -> Attribute:
        """Read an AttributeProto."""
        attribute = Attribute()
        values = attribute.values

        def several(name: str, convert: Callable[[int], Any], kind: int) -> Callable[[Any], None]:
            return lambda value: values.setdefault(name, []).extend(
                map(convert, self._numbers(value, kind))
            )

        def there(value: Any) -> bool:
            return True

        return self._message(
            "an attribute",
            content,
            attribute,
            {
                1: ((2,), _to(attribute, "name", self._text)),
                2: ((5,), _at(values, "f", _float32)),
                3: ((0,), _at(values, "i", signed)),
                4: ((2,), _at(values, "s", self._text)),
                5: ((2,), _at(values, "t", self.tensor)),
                6: ((2,), _at(values, "g", self.graph)),
                7: ((5, 2), several("floats", _float32, 5)),
                8: ((0, 2), several("ints", signed, 0)),
                9: ((2,), lambda value: values.setdefault("strings", []).append(self._text(value))),
                10: ((2,), _at(values, "tensors", there)),
                11: ((2,), _at(values, "graphs", there)),
                20: ((0,), _to(attribute, "type", signed)),
                21: ((2,), _at(values, "ref_attr_name", self._text)),
                22: ((2,), _at(values, "sparse_tensor", there)),
            },
        )

    def tensor(self, content: memoryview) -> Tensor:
        """Read a TensorProto."""
        tensor = Tensor()

        def dims(value: Any) -> None:
            for number in self._numbers(value, 0):
                tensor.dims.append(signed(number))
                if len(tensor.dims) > _MOST_AXES:
                    raise ModelFormatError(f"a tensor has more than {_MOST_AXES} axes")

        def data(name: str, kind: int) -> Callable[[Any], None]:
            def take(value: Any) -> None:
                if isinstance(value, int):  # a single number, not packed with others
                    value = memoryview(
                        _as_varint(value) if kind == 0 else value.to_bytes(_SIZES[kind], "little")
                    )
                tensor.packed.setdefault(name, []).append(value)

            return take

        def entry(value: memoryview) -> None:
            found = {"key": "", "value": ""}
            table: _Table = {
                1: ((2,), _at(found, "key", self._text)),
                2: ((2,), _at(found, "value", self._text)),
            }
            self._message("an entry", value, found, table)
            tensor.external[found["key"]] = found["value"]

        return self._message(
            "a tensor",
            content,
            tensor,
            {
                1: ((0, 2), dims),
                2: ((0,), _to(tensor, "data_type", signed)),
                **{
                    number: ((kind, 2), data(name, kind))
                    for number, (name, kind) in _PACKED.items()
                },
                8: ((2,), _to(tensor, "name", self._text)),
                9: ((2,), _to(tensor, "raw", memoryview)),
                13: ((2,), entry),
                14: ((0,), _to(tensor, "is_external", bool)),
            },
        )

    def value_info(self, content: memoryview) -> ValueInfo:
        """Read a ValueInfoProto, with the TypeProto, the tensor type and the shape in it."""
        info = ValueInfo()

        def dimension(value: memoryview) -> None:
            size: dict[str, Any] = {"n": None}
            self._message("a dimension", value, size, {1: ((0,), _at(size, "n", signed))})
            info.dims = [*(info.dims or []), size["n"]]
            if len(info.dims) > _MOST_AXES:
                raise ModelFormatError(f"a value has more than {_MOST_AXES} axes")

        def shape(value: memoryview) -> None:
            info.dims = []
            self._message("a shape", value, info, {1: ((2,), dimension)})

        def tensor_type(value: memoryview) -> None:
            table: _Table = {1: ((0,), _to(info, "elem_type", signed)), 2: ((2,), shape)}
            self._message("a tensor's type", value, info, table)

        def of_type(value: memoryview) -> None:
            self._message("a type", value, info, {1: ((2,), tensor_type)})

        return self._message(
            "a value", content, info, {1: ((2,), _to(info, "name", self._text)), 2: ((2,), of_type)}
        )


# --- setters of a field's value -------------------------------------------------------------------


def _to(into: Any, name: str, convert: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a setter of an attribute of ``into``."""
    return lambda value: setattr(into, name, convert(value))


def _at(into: dict[str, Any], key: str, convert: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a setter of an entry of a dictionary."""
    return lambda value: into.update({key: convert(value)})


def _onto(rows: list[Any], convert: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Return a function that appends to a list."""
    return lambda value: rows.append(convert(value))


def _float32(bits: int) -> float:
    return unpack("<f", bits.to_bytes(4, "little"))[0]


def _as_varint(value: int) -> bytes:
    groups = bytearray()
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
