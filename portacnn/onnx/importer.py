"""Convert operators to layers: the values of the graph so far, and the layers made from them.

A value of an ONNX graph is a ``Value`` or a ``Known`` (``portacnn.onnx.values``). A ``Value``
depends on the network's input: the output (N, *shape) of a layer. A ``Known`` is computed when the
file is read: weights, and values computed from shapes.

A converter of an operator numbers axes as in the file, with the batch as axis 0. If it is elsewhere
in the file, or if all inputs are known, the converter is not asked (``portacnn.onnx.converting``).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from portacnn.errors import ModelFormatError
from portacnn.layers import Flatten, Join, Layer, Reshape
from portacnn.layers.base import Shape
from portacnn.layers.graph import INPUT, Node
from portacnn.onnx.reading import Operation, Source, brief
from portacnn.onnx.values import Dim
from portacnn.onnx.values import Known as Known
from portacnn.onnx.values import Value as Value
from portacnn.runtime import HostArray
from portacnn.text import quoted

BATCH = -(1 << 40)
"""The number of samples in a list of sizes (``Importer.numbers``)."""
_STATE_NAMES = {"weight", "bias", "running_mean", "running_var", "value"}


class Importer:
    """Collect the nodes of a ``Graph`` and their state.

    Attributes:
        source: the file.
        opset: the version of its operators.
        batch: the batch size that the file was exported for; None for any.
        dtype: of the file's inputs.
        learn_constants: whether ``Constant`` nodes are weights, as initializers are.
        values: all values so far, by their name in the file.
        nodes: the layers so far.
        state: their parameters and buffers, by path.
        notes: what the reader of the file should know, each with the nodes that it is about.
    """

    def __init__(
        self,
        source: Source,
        sample: Shape,
        batch: int | None,
        dtype: str = "float32",
        learn_constants: bool = False,
    ) -> None:
        self.source, self.opset, self.batch = source, source.opset, batch
        self.dtype, self.learn_constants = np.dtype(dtype), learn_constants
        self.values: dict[str, Known | Value] = {}
        self.nodes: list[Node] = []
        self.state: dict[str, HostArray] = {}
        self.notes: dict[str, list[str]] = {}
        self.input = Value(INPUT, sample)
        self._names = {INPUT}
        self._next: dict[str, int] = {}
        self.unlearned = {INPUT}  # nodes before the first parameter
        self.sequences: dict[str, list[str]] = {}  # the names of their values
        self._of_weights = {name.rpartition(".")[0] for name in source.initializers}
        self.made: dict[str, dict[str, Known]] = {}  # parameters and buffers by their node

    # --- inputs of an operation -------------------------------------------------------------------

    def given(self, op: Operation, index: int) -> Known | Value | None:
        """Return the input at this index, None if it is omitted."""
        if index >= len(op.inputs) or not op.inputs[index]:
            return None
        name = op.inputs[index]
        if name not in self.values:
            self.values[name] = self.initializer(name)
        return self.values[name]

    def initializer(self, name: str) -> Known:
        """Return an initializer."""
        return Known(self.source.array(self.source.initializers[name]), True, name)

    def value(self, op: Operation, index: int = 0) -> Value:
        """Return the input at this index, which must depend on the network's input."""
        found = self.given(op, index)
        if not isinstance(found, Value):
            what = "is missing" if found is None else "does not depend on the network's input"
            raise op.wrong(f"its input {index} {what}; that is not supported")
        return found

    def known(self, op: Operation, index: int) -> Known | None:
        """Return the input at this index, which must be known when the file is read; None if it is
        omitted."""
        found = self.given(op, index)
        if isinstance(found, Value):
            raise op.wrong(
                f"its input {index} is computed from the network's input; only constants are "
                "supported there"
            )
        return found

    def weight(self, op: Operation, index: int) -> Known:
        """Return the known input at this index, which must be floating point and not omitted."""
        found = self.known(op, index)
        if found is None:
            raise op.wrong(f"its input {index} is missing")
        if found.array.dtype.kind != "f":
            raise op.wrong(f"its input {index} must be floating point, got {found.array.dtype}")
        return found

    def optional_weight(self, op: Operation, index: int) -> Known | None:
        """Return the known floating-point input at this index, or None if it is omitted."""
        return None if self.given(op, index) is None else self.weight(op, index)

    def numbers(self, op: Operation, index: int, attribute: str | None = None) -> list[int] | None:
        """Return whole numbers from an input, or in older opsets an attribute; None if omitted."""
        if attribute is not None and op.has(attribute):
            return op.ints(attribute)
        found = self.known(op, index)
        if found is None:
            return None
        if found.array.dtype.kind not in "iu" or found.array.size > 1024:
            raise op.wrong(
                f"its input {index} must be a short list of whole numbers, got {_kind_of(found)}"
            )
        dims = found.dims()
        if any(b and (a, b) != (0, 1) for a, b in dims):
            raise op.wrong(f"its input {index} is computed from the number of samples")
        return [BATCH if b else a for a, b in dims]

    def sizes(self, op: Operation, index: int, attribute: str) -> list[Dim]:
        """Return the sizes of a shape, from an input, or in older opsets an attribute."""
        if op.has(attribute):
            return [(n, 0) for n in op.ints(attribute) or []]
        found = self.known(op, index)
        if found is None or found.array.dtype.kind not in "iu" or found.array.size > 16:
            what = "missing" if found is None else _kind_of(found)
            raise op.wrong(f"its input {index} is {what}; expected a short list of whole numbers")
        return found.dims()

    def number(
        self, op: Operation, index: int, attribute: str, default: float | None
    ) -> float | None:
        """Return one number from an input, or in older opsets an attribute.

        If it is omitted, the default is returned.
        """
        if op.has(attribute):
            return op.real(attribute, 0.0)
        found = self.known(op, index)
        if found is None or not found.array.size:
            return default
        if found.array.size != 1:
            raise op.wrong(f"its input {index} must be one number, got {_kind_of(found)}")
        return float(found.array.reshape(-1)[0])

    def axis(self, op: Operation, axis: int, rank: int, *, sample: bool = True) -> int:
        """Return an axis counted from 0; with ``sample`` it must not be the batch axis."""
        if not -rank <= axis < rank:
            raise op.wrong(f"axis {axis} is outside the {rank} axes")
        if sample and axis % rank == 0:
            raise op.wrong(
                "it operates on the batch (axis 0), which is not supported: samples must be "
                "independent"
            )
        return axis % rank

    def axes(self, op: Operation, axes: Sequence[int], rank: int) -> list[int]:
        """Return several axes, all different."""
        found = [self.axis(op, axis, rank) for axis in axes]
        if len(set(found)) != len(found):
            raise op.wrong(f"axes {brief(axes)} contain one twice")
        return found

    # --- adding layers ----------------------------------------------------------------------------

    def add(self, op: Operation, layer: Layer, *inputs: Value, **state: Known) -> Value:
        """Add a layer that takes these values, with its parameters and buffers; return its
        output."""
        if len({(value.outer, value.inner) for value in inputs}) > 1:
            raise op.wrong(
                "its inputs have different axes merged with the batch: "
                + " and ".join(value.described() for value in inputs)
            )
        given: Any = tuple(value.shape for value in inputs)
        name = self._name(op, state)
        shape = layer.plan(given if isinstance(layer, Join) else given[0], name)
        declared: dict[str, Any] = {**layer.declared, **layer.declared_buffers}
        for key, known in state.items():
            if known.array.shape != declared[key].shape:
                raise op.wrong(
                    f"{key} must have shape {brief(declared[key].shape)}, got "
                    f"{brief(known.array.shape)}"
                )
            self.source.budget.take(4 * known.array.size)
            self.state[f"{name}.{key}"] = known.array
        self.made[name] = state
        if not layer.declared and all(value.node in self.unlearned for value in inputs):
            self.unlearned.add(name)
        self.nodes.append(Node(name, layer, tuple(value.node for value in inputs)))
        return Value(name, shape, 0, inputs[0].outer, inputs[0].inner)

    def reshaped(self, op: Operation, x: Value, shape: Sequence[int]) -> Value:
        """Add a reshape of the samples and return its output; return x if it already has that
        shape."""
        if tuple(shape) == x.shape:
            return x
        return self.add(
            op, Flatten() if len(shape) == 1 and len(x.shape) > 1 else Reshape(shape), x
        )

    def constant(self, name: str, numbers: Sequence[int]) -> str:
        """Make whole numbers a value with a name that is not used yet, and return the name."""
        while name in self.values or name in self.source.initializers:
            name += "+"
        self.values[name] = Known(np.array(numbers, np.int64))
        return name

    def fold(self, array: Any, like: Sequence[Known] = ()) -> Known:
        """Return a value computed from known arrays. It is learnable if one of them is."""
        array = np.asarray(array)
        if array.base is None:
            self.source.budget.take(array.nbytes)
        only = like[0].name if len(like) == 1 else ""
        return Known(array, any(known.learn for known in like), only)

    def leading_to(self, *outputs: Value) -> list[Node]:
        """Return the nodes that these values depend on; other nodes only supplied shapes."""
        wanted, found = {value.node for value in outputs}, []
        for node in reversed(self.nodes):
            if node.name in wanted:
                found.append(node)
                wanted.update(node.inputs)
        return found[::-1]

    def state_of(self, nodes: Sequence[Node]) -> dict[str, HostArray]:
        """Return the parameters and buffers of some nodes, by path. The state of a layer in several
        nodes is stored under the first one's name."""
        first = {id(node.layer): node for node in reversed(nodes)}
        return {
            f"{node.name}.{key}": self.state[f"{node.name}.{key}"]
            for node in first.values()
            for key in self.made.get(node.name, {})
            if key not in node.layer.tied
        }

    def _name(self, op: Operation, state: Mapping[str, Known]) -> str:
        """Return a node's name: that of its parameters in the file, the node's own, or its
        operator's.

        The operator is removed from names such as "block1/conv/Conv", which PyTorch and
        ``portacnn.onnx.export`` write. So dropout keeps its path, and therefore its masks. A layer
        of several nodes leaves its path to the one with the weights.
        """
        for known in state.values():
            prefix, _, last = known.name.rpartition(".")
            if prefix and last in _STATE_NAMES:
                return self._new(prefix)
        prefix, _, last = op.name.rpartition("/")
        alone = prefix and last == op.kind and prefix not in self._of_weights
        return self._new(prefix if alone else op.name or op.kind.lower())

    def _new(self, name: str) -> str:
        base, found = name, name
        while found in self._names:
            self._next[base] = self._next.get(base, 0) + 1
            found = f"{base}_{self._next[base]}"
        self._names.add(found)
        return found


def _kind_of(known: Known) -> str:
    return f"{known.array.dtype} {brief(known.array.shape)}"


def unmade(op: Operation, name: str) -> ModelFormatError:
    """Return the error for an output that is used but that no layer computes."""
    return op.wrong(
        f"its output {op.outputs.index(name)} ({quoted(name)}) is used, which is not supported"
    )


# --- operators ------------------------------------------------------------------------------------

Converter = Callable[[Importer, Operation], Any]
OPERATORS: dict[str, Converter] = {}
"""All supported operators, by name."""


COMPUTES = set[str]()
"""Operators whose converters compute the outputs of constants themselves."""


def operator(*names: str, computes: bool = False) -> Callable[[Converter], Converter]:
    """Register a converter under these names.

    Args:
        computes: whether it computes the outputs of constants; others get no constants only.
    """
    COMPUTES.update(names if computes else ())

    def enter(convert: Converter) -> Converter:
        OPERATORS.update(dict.fromkeys(names, convert))
        return convert

    return enter


# --- what several operators use -------------------------------------------------------------------


def all_known(at: Importer, op: Operation) -> list[Known] | None:
    """Return all inputs if all are known, else None."""
    given = [at.given(op, i) for i in range(len(op.inputs))]
    return given if given and all(isinstance(v, Known) for v in given) else None  # type: ignore[return-value]


def some(**state: Known | None) -> dict[str, Known]:
    """Return the items that are not None."""
    return {name: known for name, known in state.items() if known is not None}


def of_sample(op: Operation, array: Any, x: Value) -> Any:
    """Return a constant without the batch axis, which must have length 1 or be absent."""
    shape = array.shape
    if len(shape) == x.rank and shape[0] == 1:
        shape = shape[1:]
    if len(shape) >= x.rank or 0 in shape:
        raise op.wrong(
            f"expected a constant that broadcasts to samples {brief(x.shape)}, "
            f"got {brief(array.shape)}"
        )
    return array.reshape(shape)


def plain_axes(op: Operation, axes: Sequence[int], rank: int) -> list[int]:
    """Return axes of a constant as non-negative numbers."""
    if any(not -rank <= axis < rank for axis in axes) or len({axis % rank for axis in axes}) != len(
        axes
    ):
        raise op.wrong(f"axes {brief(axes)} are outside the {rank} axes")
    return [axis % rank for axis in axes]


def spatial_axes(at: Importer, op: Operation, x: Value) -> int:
    """Return the number of spatial axes: 1 to 3."""
    if not 3 <= x.rank <= 5:
        raise op.wrong(f"expected samples (C, W), (C, H, W) or (C, D, H, W), got {brief(x.shape)}")
    return x.rank - 2


def for_training(at: Importer, op: Operation) -> bool:
    """Return the attribute of opset 6 that selects training mode: ``is_test=0``."""
    if at.opset >= 7 and op.has("is_test"):
        raise op.wrong("is_test is an attribute of opset 6 and older")
    return not op.whole("is_test", 1)
