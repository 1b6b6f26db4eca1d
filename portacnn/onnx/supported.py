"""Which operations the outputs of a graph need, and whether all of them are supported."""

from collections import Counter
from collections.abc import Iterable, Sequence

from portacnn.errors import ModelFormatError
from portacnn.onnx.folding import FOLDED
from portacnn.onnx.importer import OPERATORS
from portacnn.onnx.reading import Operation
from portacnn.text import quoted, shown

_RECURRENT = frozenset(("GRU", "LSTM", "RNN"))
CONTROL = frozenset(("If", "SequenceAt", "SplitToSequence"))
"""Operators that other operators are run for."""
_OF_SHAPES = frozenset(("Shape", "Size"))  # their outputs do not depend on their input's elements
_MOST_NAMED = 24  # operators in an error message


def needed(
    operations: Sequence[Operation], names: Iterable[str]
) -> tuple[list[Operation], set[str]]:
    """Return the operations that some values depend on, in order, and the names of all values they
    use."""
    asked, found = set(names), []
    for op in reversed(operations):
        if not asked.isdisjoint(op.outputs):
            found.append(op)
            asked |= op.names()
    return found[::-1], asked


def check_supported(operations: Sequence[Operation], inputs: Iterable[str]) -> None:
    """Raise ModelFormatError if operators are not supported: all of them are listed.

    Args:
        inputs: the names of the values that depend on the network's input.
    """
    variable, unknown = set(inputs), []
    for op in operations:
        names = op.inputs[:1] if op.kind == "CastLike" else op.names()
        depends = not variable.isdisjoint(names)
        if (
            op.kind not in OPERATORS
            and op.kind not in CONTROL
            and (depends or op.kind not in FOLDED)
        ):
            unknown.append(op)
        if depends and op.kind not in _OF_SHAPES:
            variable.update(op.outputs)
    if not unknown:
        return
    counts = Counter(op.kind for op in unknown)
    first = {op.kind: op.label for op in reversed(unknown)}
    kinds = [
        f"{shown(kind)} ({f'{count} nodes, first' if count > 1 else 'node'} {quoted(first[kind])})"
        for kind, count in counts.most_common(_MOST_NAMED)
    ]
    more = f", and {len(counts) - _MOST_NAMED} others" if len(counts) > _MOST_NAMED else ""
    message = f"it uses operators that are not supported: {', '.join(kinds)}{more}"
    if recurrent := sorted(_RECURRENT.intersection(counts)):
        message += (
            f"; {' and '.join(recurrent)}: recurrent networks are outside of what portacnn is for, "
            "convolutional networks"
        )
    raise ModelFormatError(f"{message}; docs/onnx.md lists the supported operators")
