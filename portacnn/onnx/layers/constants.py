"""Operators that make constants or return their input. They have no layer."""

from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.onnx.folding import shape_of, size_of
from portacnn.onnx.importer import Importer, operator
from portacnn.onnx.reading import FLOATS, Operation
from portacnn.onnx.values import Known, Value


@operator("Constant")
def read_constant(at: Importer, op: Operation) -> Known:
    found = op.any_of(
        ("value", "t"),
        ("value_float", "f"),
        ("value_floats", "floats"),
        ("value_int", "i"),
        ("value_ints", "ints"),
    )
    if found is None:
        raise op.wrong("its value must be a tensor of numbers")
    name, value = found
    if name == "value":
        array = at.source.array(value)
        return Known(array, at.learn_constants and array.dtype.kind == "f")
    return at.fold(np.array(value, np.float32 if "float" in name else np.int64))


@operator("Shape")
def read_shape(at: Importer, op: Operation) -> Known:
    return shape_of(op, at.value(op).dims())


@operator("Size")
def read_size(at: Importer, op: Operation) -> Known:
    return size_of(at.value(op).dims())


_BOOL = 9


@operator("Cast")
def read_cast(at: Importer, op: Operation) -> Value:
    to = op.whole("to", 0)
    op.ignore("saturate", "round_mode")
    if to == _BOOL:
        return at.add(op, L.Elementwise("nonzero"), at.value(op))
    if to not in FLOATS:
        raise op.wrong(f"values can be cast only to floating point or bool, not to type {to}")
    return at.value(op)


@operator("CastLike")
def read_cast_like(at: Importer, op: Operation) -> Any:
    """Return a value as it is, and a constant in the dtype of the network's values."""
    found, like = at.given(op, 0), at.given(op, 1)
    op.ignore("saturate", "round_mode")
    if isinstance(found, Known):
        at.source.budget.take(found.array.size * at.dtype.itemsize)
        return found._replace(array=found.array.astype(at.dtype))
    if isinstance(like, Known) and like.array.dtype.kind != "f":
        raise op.wrong(f"values can be cast only to floating point, not to {like.array.dtype}")
    return at.value(op)


@operator("Identity")
def read_identity(at: Importer, op: Operation) -> Any:
    return at.value(op)
