"""Convert the operations of a file one by one.

An operation whose inputs are all known is computed at once. One whose inputs have the batch
elsewhere than at axis 0 is rewritten first. All others are read by their converters.
"""

from typing import Any

from portacnn.errors import ModelFormatError, PortacnnError
from portacnn.onnx import folding, moved, sequences
from portacnn.onnx.batch_axis import MOVING
from portacnn.onnx.branches import chosen_branch
from portacnn.onnx.importer import OPERATORS, Importer
from portacnn.onnx.reading import Operation
from portacnn.onnx.values import Known, Value
from portacnn.text import quoted

_TAKES_SIZES = {"Expand": (1,), "Reshape": (1,), "Resize": (3,)}
"""Operators on values whose sizes may contain the number of samples, with the inputs."""


def run(at: Importer, op: Operation) -> None:
    """Convert one operation to layers or known arrays, and store its outputs by name."""
    try:
        made = _converted(at, op)
        op.check_all_asked()
    except PortacnnError as error:
        if isinstance(error, ModelFormatError):
            raise error.at(op.where)
        raise ModelFormatError(str(error), op.where) from error
    made = made if isinstance(made, list) else [made]
    for name, value in zip(op.outputs, made, strict=False):
        if name:
            at.values[name] = value


def _converted(at: Importer, op: Operation) -> Any:
    if op.kind == "If":
        operations, outputs = chosen_branch(at, op)
        for inner in operations:
            run(at, inner)
        return [_found(at, op, name) for name in outputs]
    if op.kind == "SplitToSequence":
        sequences.split(at, op, run)
        return []
    if op.kind == "SequenceAt":
        return sequences.item(at, op)
    given = [at.given(op, i) for i in range(len(op.inputs))]
    if any(value is not None for value in given) and not any(
        isinstance(value, Value) for value in given
    ):
        return folding.fold(at, op, given)  # type: ignore[arg-type]
    if op.kind not in OPERATORS:
        raise op.wrong("it is supported for constants only")
    for index, value in enumerate(given):
        counted = isinstance(value, Known) and value.per_sample is not None
        if counted and index not in _TAKES_SIZES.get(op.kind, ()):
            raise op.wrong(
                "it computes with the number of samples, which is unknown; only shapes that keep "
                "it are supported"
            )
        if isinstance(value, Known) and value.across is not None:
            moved.check_across(op, value, [v for v in given if isinstance(v, Value)])
    if (same := moved.of_one_sample(at, op)) is not None:
        return same
    if op.kind not in MOVING and moved.is_moved(at, op):
        return moved.convert(at, op, OPERATORS[op.kind])
    return OPERATORS[op.kind](at, op)


def _found(at: Importer, op: Operation, name: str) -> Known | Value:
    """Return the value with a name in a branch, which may be an initializer."""
    if name not in at.values and name in at.source.initializers:
        at.values[name] = at.initializer(name)
    if name not in at.values:
        raise op.wrong(f"its output {quoted(name)} is not supported")
    return at.values[name]
