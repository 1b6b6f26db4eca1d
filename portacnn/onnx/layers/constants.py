"""Operators that make constants or return their input. They have no layer."""

from math import prod
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.onnx.importer import BATCH, Importer, Known, no_batch, operator
from portacnn.onnx.reading import FLOATS, Operation, brief


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
        return Known(at.source.array(value))
    return at.fold(np.array(value, np.float32 if "float" in name else np.int64))


@operator("ConstantOfShape")
def read_constant_of_shape(at: Importer, op: Operation) -> Known:
    shape, found = at.numbers(op, 0), op.any_of(("value", "t"))
    value = np.zeros((), np.float32) if found is None else at.source.array(found[1])
    if (
        shape is None
        or value.size != 1
        or any(not 0 <= n < 1 << 31 for n in shape)
        or len(shape) > 16
    ):
        raise op.wrong("its shape or value is invalid")
    if 0 in shape and len(shape) > 1:
        raise op.wrong(f"a tensor of shape {brief(shape)} is empty")
    at.source.budget.take(prod(shape) * value.itemsize)
    return at.fold(np.full(shape, value.reshape(()), value.dtype))


@operator("Shape")
def read_shape(at: Importer, op: Operation) -> Known:
    found = at.given(op, 0)
    shape = found.array.shape if isinstance(found, Known) else (BATCH, *at.value(op).shape)
    end = op.whole("end", len(shape)) if op.has("end") else None
    return at.fold(np.array(shape[slice(op.whole("start", 0), end)], np.int64))


_BOOL = 9
_CAST = {
    **{number: name for number, name in FLOATS.items() if name != "bfloat16"},
    6: "int32",
    7: "int64",
    9: "bool",
}


@operator("Cast")
def read_cast(at: Importer, op: Operation) -> Any:
    found, to = at.given(op, 0), op.whole("to", 0)
    op.ignore("saturate", "round_mode")
    if isinstance(found, Known):
        if to not in _CAST:
            raise op.wrong(f"casting constants to type {to} is not supported")
        dtype = np.dtype(_CAST[to])
        if dtype != np.int64:
            no_batch(op, found)
        at.source.budget.take(found.array.size * dtype.itemsize)
        return at.fold(found.array.astype(dtype), [found])
    if to == _BOOL:
        return at.add(op, L.Elementwise("nonzero"), at.value(op))
    if to not in FLOATS:
        raise op.wrong(f"values can be cast only to floating point or bool, not to type {to}")
    return at.value(op)


@operator("Identity")
def read_identity(at: Importer, op: Operation) -> Any:
    found = at.given(op, 0)
    return at.value(op) if found is None else found
