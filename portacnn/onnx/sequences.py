"""Sequences of values, which PyTorch makes of ``chunk`` and ``split``: SplitToSequence is read as
Split, SequenceAt as one of its outputs."""

from collections.abc import Callable
from typing import Any

from portacnn.onnx.importer import Importer
from portacnn.onnx.reading import Operation, brief
from portacnn.onnx.values import Known, Value

_MOST = 1024  # values in a sequence


def split(at: Importer, op: Operation, run: Callable[[Importer, Operation], None]) -> None:
    """Split a value, and remember its parts as a sequence."""
    found, axis = at.given(op, 0), op.whole("axis", 0)
    if found is None or not op.whole("keepdims", 1):
        raise op.wrong("its input is missing, or keepdims=0, which is not supported")
    dims = found.dims() if isinstance(found, Value) else [(n, 0) for n in found.array.shape]
    if not -len(dims) <= axis < len(dims) or dims[axis][1]:
        raise op.wrong(f"axis {axis} is the batch or outside the {len(dims)} axes")
    size, known = dims[axis][0], at.known(op, 1)
    sizes = at.numbers(op, 1) or [1]
    if known is None or not known.array.ndim:  # the same size for all
        each = max(1, sizes[0])
        sizes = [min(each, size - first) for first in range(0, min(size, each * _MOST), each)]
    if len(sizes) > _MOST or any(n < 1 for n in sizes) or sum(sizes) != size:
        raise op.wrong(f"{size} elements cannot be split into {brief(sizes)}")
    names = [f"{op.outputs[0]}, part {i}" for i in range(len(sizes))]
    if taken := [name for name in names if name in at.values]:
        raise op.wrong(f"its output {taken[0]!r:.80} already exists")
    parts = at.constant(f"{op.outputs[0]}, sizes", sizes)
    inputs = [op.inputs[0], parts]
    attributes: dict[str, tuple[str, Any]] = {"axis": ("i", axis)}
    if at.opset < 13:
        del inputs[1:]
        attributes["split"] = ("ints", sizes)
    run(at, Operation(op.name, "Split", inputs, names, attributes))
    at.sequences[op.outputs[0]] = names


def item(at: Importer, op: Operation) -> Known | Value:
    """Return a value of a sequence, by a known index."""
    names = at.sequences.get(op.inputs[0], []) if len(op.inputs) == 2 else []
    index = (at.numbers(op, 1) or [0])[0] if names else 0
    if not -len(names) <= index < len(names):
        raise op.wrong(f"its index {index} is outside a sequence of {len(names)}")
    return at.values[names[index]]
