"""Quantization: constants are read as floats, values are simulated (``L.Quantize``)."""

from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.layers.quantize import RANGES
from portacnn.onnx.builder import CODES, GraphBuilder, emitter
from portacnn.onnx.importer import Importer, Known, Value, operator
from portacnn.onnx.reading import TYPES, Operation, brief

_INTEGERS = {np.dtype(kind.dtype): kind.name for kind in TYPES.values() if kind.name in RANGES}


@operator("QuantizeLinear", computes=True)
def read_quantize(at: Importer, op: Operation) -> Any:
    op.ignore("saturate", "precision")
    scale, zero = _scale_and_zero(at, op)
    code = op.whole("output_dtype", 0)
    if zero is not None:
        name = _INTEGERS.get(zero.array.dtype)
    else:
        name = TYPES[code or CODES["uint8"]].name if (code or 2) in TYPES else None
    if name not in RANGES:
        raise op.wrong(f"it must quantize to one of {', '.join(RANGES)}")
    found = at.given(op, 0)
    if isinstance(found, Known):
        values = _spread(at, op, found, scale, zero)
        at.source.budget.take(found.array.nbytes)
        q = np.round(found.array / values[0]) + values[1]
        return found._replace(array=np.clip(q, *RANGES[name]).astype(name))
    return _add(at, op, L.Quantize, name, scale, zero)


@operator("DequantizeLinear", computes=True)
def read_dequantize(at: Importer, op: Operation) -> Any:
    op.ignore("output_dtype")
    scale, zero = _scale_and_zero(at, op)
    found = at.given(op, 0)
    if not isinstance(found, Known):
        name = "uint8" if zero is None else _INTEGERS.get(zero.array.dtype, "")
        if name not in RANGES:
            raise op.wrong(f"values must be quantized to one of {', '.join(RANGES)}")
        return _add(at, op, L.Dequantize, name, scale, zero)
    if found.array.dtype.kind not in "iu":
        raise op.wrong(f"expected integers, got {found.array.dtype}")
    at.source.budget.widen(found.name, found.array.size * scale.array.itemsize)
    values = _spread(at, op, found, scale, zero)
    array = (found.array.astype(scale.array.dtype) - values[1]) * values[0]
    return found._replace(array=array.astype(scale.array.dtype, copy=False))


def _scale_and_zero(at: Importer, op: Operation) -> tuple[Known, Known | None]:
    scale, zero = at.weight(op, 1), at.known(op, 2)
    if zero is not None and (
        zero.array.shape != scale.array.shape or zero.array.dtype.kind not in "iu"
    ):
        raise op.wrong(
            f"its zero point must be integers {brief(scale.array.shape)}, got "
            f"{zero.array.dtype} {brief(zero.array.shape)}"
        )
    if not np.isfinite(scale.array).all() or (scale.array <= 0).any():
        raise op.wrong("its scale must be above 0")
    return scale, zero


def _spread(
    at: Importer, op: Operation, found: Known, scale: Known, zero: Known | None
) -> tuple[Any, Any]:
    """Return scale and zero point so that they broadcast with a constant."""
    shape, block = found.array.shape, op.whole("block_size", 0)
    axis, count = op.whole("axis", 1), scale.array.size
    zeros = np.zeros_like(scale.array) if zero is None else zero.array.astype(scale.array.dtype)
    if count == 1 and scale.array.ndim <= 1 and not block:
        return scale.array.reshape(()), zeros.reshape(())
    if not -len(shape) <= axis < len(shape):
        raise op.wrong(f"axis {axis} is outside the {len(shape)} axes")
    axis %= len(shape)
    if block:
        rows = list(shape)
        rows[axis] = -(-shape[axis] // block) if block > 0 else -1
        if scale.array.shape != tuple(rows):
            raise op.wrong(f"its scale must be {brief(rows)}, got {brief(scale.array.shape)}")
        at.source.budget.take(2 * scale.array.itemsize * (found.array.size + block * count))
        cut = (slice(None),) * axis + (slice(shape[axis]),)
        return tuple(np.repeat(a, block, axis)[cut] for a in (scale.array, zeros))  # type: ignore[return-value]
    if scale.array.shape != (shape[axis],):
        raise op.wrong(
            f"its scale must be a number or {shape[axis]} of them, got {brief(scale.array.shape)}"
        )
    column = (-1, *(1,) * (len(shape) - axis - 1))
    return scale.array.reshape(column), zeros.reshape(column)


def _add(
    at: Importer, op: Operation, kind: Any, name: str, scale: Known, zero: Known | None
) -> Value:
    """Add a layer that quantizes values or the reverse."""
    x, axis = at.value(op), op.whole("axis", 1)
    if op.whole("block_size", 0):
        raise op.wrong("block_size is supported for constants only")
    one = scale.array.size == 1 and scale.array.ndim <= 1
    zeros = np.zeros_like(scale.array) if zero is None else zero.array
    state = {"scale": scale.array, "zero_point": zeros.astype(scale.array.dtype)}
    known = {key: Known(a.reshape(()) if one else a) for key, a in state.items()}
    layer = kind(name, None if one else at.axis(op, axis, x.rank))
    return at.add(op, layer, x, **known)


@emitter(L.Quantize)
def write_quantize(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("QuantizeLinear", [x, *_stored(graph, layer)], axis=layer.axis)


@emitter(L.Dequantize)
def write_dequantize(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("DequantizeLinear", [x, *_stored(graph, layer)], axis=layer.axis)


def _stored(graph: GraphBuilder, layer: Any) -> list[str]:
    zero = layer.home.to_host(layer.buffers["zero_point"])
    path = layer.full_name("zero_point")
    return [
        graph.weight(layer, "scale"),
        graph.stored_once(path, lambda: zero, layer.integers),
    ]
