"""``GraphBuilder``, which builds an ONNX graph node by node, and the table of layers' emitters.

A layer's *emitter* is a function ``(graph, layer, x) -> y``: it adds nodes and returns the name of
the layer's output. The emitters of portacnn's layers are in ``portacnn.onnx.layers``.

There are two kinds of arrays. A layer's parameters and buffers are initializers, named by their
paths ("layer1.0.conv1.weight"). Values that belong to the graph only (a shape, a factor) are
``Constant`` nodes. A node is named by its layer's path and its operator ("layer1.0.conv1/Conv"),
and its output has the node's name.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any, NamedTuple

from portacnn.errors import ArgumentError, PortacnnError
from portacnn.layers import Layer
from portacnn.onnx.library import onnx_library
from portacnn.runtime import HostArray

Emitter = Callable[..., str]
Pads = Sequence[tuple[int, int]]
"""(before, after) for each axis."""

CODES = {
    **{"float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7},
    **{"bool": 9, "float16": 10, "float64": 11, "bfloat16": 16},
}
"""The values of ONNX's TensorProto.DataType, by dtype."""
BYTES = {"float32": 4, "float16": 2, "float64": 8, "bfloat16": 2}
BYTES |= {"int8": 1, "uint8": 1, "int16": 2, "uint16": 2, "int32": 4}
_LARGEST = {
    "float16": 65520.0,
    "bfloat16": 3.3961776e38,
    "float32": 3.4028236e38,
}  # larger values round to infinity

_emitters: dict[type[Layer], Emitter] = {}


def emitter(*kinds: type[Layer]) -> Callable[[Emitter], Emitter]:
    """Return a decorator that registers the ONNX emitter of your layer classes.

        @portacnn.onnx.emitter(Swish)
        def swish(graph, layer, x):
            return graph.add("Mul", [x, graph.add("Sigmoid", [x])])

    The function takes the ``GraphBuilder``, the layer, and the name of its input (of each input,
    for a layer that takes several), and returns the name of its output. ``layer.input_shape`` and
    ``layer.output_shape`` are set. A subclass uses its base class's emitter, unless it overrides a
    method.
    """

    def enter(function: Emitter) -> Emitter:
        _emitters.update(dict.fromkeys(kinds, function))
        return function

    return enter


def emitter_of(layer: Layer) -> Emitter:
    """Return the emitter of a layer. Raises ArgumentError with its path if there is none."""
    redefined: set[str] = set()
    for kind in type(layer).__mro__:
        if kind in _emitters:
            changed = sorted(name for name in redefined if hasattr(kind, name))
            if not changed:
                return _emitters[kind]
            raise ArgumentError(
                f"has no ONNX emitter: it derives from {kind.__name__} but overrides "
                f"{', '.join(changed)}; register one with "
                f"@portacnn.onnx.emitter({type(layer).__name__})",
                layer.where,
            )
        redefined |= {name for name in vars(kind) if not name.startswith("__")}
    raise ArgumentError(
        f"has no ONNX emitter; register one with @portacnn.onnx.emitter({type(layer).__name__})",
        layer.where,
    )


class Stored(NamedTuple):
    """An initializer: its name, and its elements as stored in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: HostArray  # of ``shape``, little-endian; bfloat16 as the 16 bits of each

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return prod(self.shape) * BYTES[self.dtype]

    def content(self) -> bytes:
        """Return the bytes."""
        return self.values.tobytes()


class GraphBuilder:
    """An ONNX graph that layers are written into.

    Attributes:
        opset: version of ONNX's operators.
        dtype: dtype of the computation: "float32" or "float64".
        stored: dtype in which weights of two or more axes are stored, if it is not ``dtype``. They
            are then cast in the graph.
    """

    def __init__(self, opset: int, dtype: str, stored: str | None = None) -> None:
        self.opset, self.dtype, self.stored = opset, dtype, stored or dtype
        self.nodes: list[Any] = []
        self.initializers: dict[str, Stored] = {}
        self._values: set[str] = set()
        self._weights: dict[str, str] = {}
        self._places: dict[Layer, int] = {}  # how often each layer was written
        self._scope = ""
        self._helper = onnx_library().helper

    # --- what emitters use ------------------------------------------------------------------------

    def add(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node; return the name of its output.

        Args:
            op_type: one of ONNX's operators, in the version of ``opset``.
            inputs: names of values; "" for an optional input that is omitted.
            attributes: numbers, strings and lists of them; None omits an attribute.
        """
        name = self.fresh(op_type)
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(self._helper.make_node(op_type, list(inputs), [name], name=name, **given))
        return name

    def layer(self, layer: Layer, *inputs: str) -> str:
        """Write a layer, and all layers in it, into the graph; return the name of its output."""
        write = emitter_of(layer)
        number = self._places.get(layer, 0)
        self._places[layer] = number + 1
        # a layer used in several places may have several shapes
        if number < len(layer.places):
            _, layer.input_shape, layer.output_shape = layer.places[number]
        with self.scope(layer.path):
            try:
                output = write(self, layer, *inputs)
            except PortacnnError as error:
                raise error.at(layer.where)
            if output not in self._values:
                raise ArgumentError(
                    f"its emitter must return the name of a value, got {output!r}", layer.where
                )
        return output

    def weight(self, layer: Layer, name: str) -> str:
        """Return the name of the layer's parameter or buffer, an initializer named by its path,
        stored once."""
        owner, name = layer.tied.get(name, (layer, name))
        array = owner.params[name] if name in owner.params else owner.buffers[name]
        return self.stored_once(owner.full_name(name), lambda: owner.home.to_host(array))

    def stored_once(
        self, path: str, values: Callable[[], HostArray], dtype: str | None = None
    ) -> str:
        """Return the name of an initializer; it is stored the first time only."""
        if path not in self._weights:
            self._weights[path] = self.initializer(path, values(), dtype)
        return self._weights[path]

    def initializer(self, path: str, values: HostArray, dtype: str | None = None) -> str:
        """Store an array of the network in the graph's dtype, or of integers in ``dtype``; return
        the name of its value."""
        stored = dtype or (self.stored if values.ndim > 1 else self.dtype)
        if path in self._values:
            raise ArgumentError(f"expected unique names of values, got {path!r} twice")
        self._values.add(path)
        self.initializers[path] = Stored(
            path, tuple(values.shape), stored, _packed(values, stored, path)
        )
        return path if stored in (self.dtype, dtype) else self.cast(path)

    def constant(
        self,
        values: float | Sequence[float],
        shape: Sequence[int] | None = None,
        dtype: str | None = None,
    ) -> str:
        """Add a number, or elements in row-major order for ``shape``; return the name of the value.

        The default dtype is the graph's.
        """
        several = isinstance(values, Sequence)
        numbers = list(values) if isinstance(values, Sequence) else [values]
        dims = list(shape) if shape is not None else [len(numbers)] if several else []
        code = CODES[dtype or self.dtype]
        return self.add(
            "Constant", [], value=self._helper.make_tensor("value", code, dims, numbers)
        )

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Reshape x. 0 keeps x's own extent at that place, so it keeps the batch at the first
        place."""
        return self.add("Reshape", [x, self.constant(shape, dtype="int64")])

    def cast(self, x: str, dtype: str | None = None) -> str:
        """Cast x; the default dtype is the graph's."""
        return self.add("Cast", [x], to=CODES[dtype or self.dtype])

    def reduce(self, op_type: str, x: str, axes: Sequence[int]) -> str:
        """Add a reduction such as ReduceMean over ``axes``, which are kept with length 1."""
        if self.opset >= (13 if op_type == "ReduceSum" else 18):
            return self.add(op_type, [x, self.constant(axes, dtype="int64")], keepdims=1)
        return self.add(op_type, [x], axes=list(axes), keepdims=1)

    # --- what ``export`` uses ---------------------------------------------------------------------

    @contextmanager
    def scope(self, path: str) -> Iterator[None]:
        """Add the nodes of the ``with`` block to the layer at ``path``."""
        before, self._scope = self._scope, path
        try:
            yield
        finally:
            self._scope = before

    def fresh(self, name: str) -> str:
        """Return an unused name for a value: ``name`` within the scope, with a number appended if
        that name exists."""
        base = f"{self._scope}/{name}" if self._scope else name
        number, taken = 0, base
        while taken in self._values:
            number += 1
            taken = f"{base}_{number}"
        self._values.add(taken)
        return taken


def _packed(values: HostArray, dtype: str, path: str) -> HostArray:
    """Return the elements as stored in the file. Raises ArgumentError if a finite element overflows
    ``dtype``."""
    if dtype in _LARGEST and values.size:
        size = abs(values)
        largest = float(size.max(where=size < float("inf"), initial=0.0))
        if largest >= _LARGEST[dtype]:
            raise ArgumentError(
                f"{path} contains {largest:g}, which overflows {dtype}; choose another dtype"
            )
    if dtype != "bfloat16":
        little = {"f": "<f", "i": "<i", "u": "<u"}[dtype[0]] + str(BYTES[dtype])
        return values.astype(little, order="C", copy=False)
    wide = values.astype("<f4", order="C")
    bits = wide.view("<u4")
    # round to nearest, ties to even
    half = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    half[wide != wide] = 0x7FC0
    return half


def sides(pads: Pads) -> list[int]:
    """Return ((before, after), ...) in ONNX's order: all befores, then all afters."""
    return [before for before, _ in pads] + [after for _, after in pads]


def bias_of(graph: GraphBuilder, layer: Any) -> list[str]:
    return [graph.weight(layer, "bias")] if "bias" in layer.params else []
