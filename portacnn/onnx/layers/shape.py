"""Layers that move, select or sum elements: reshape, transpose, pad, slice, take, reduce."""

from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.errors import ArgumentError
from portacnn.models.resnet import PadChannels
from portacnn.onnx.batch_axis import flatten, reshape, squeeze, transpose, unsqueeze
from portacnn.onnx.builder import GraphBuilder, emitter, sides
from portacnn.onnx.importer import BATCH, Importer, Value, operator, plain_axes
from portacnn.onnx.reading import Operation, brief


@emitter(L.Reshape)
def write_reshape(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.reshape(x, (0, *layer.shape))


@operator("Reshape")
def read_reshape(at: Importer, op: Operation) -> Value:
    wanted, zero = at.sizes(op, 1, "shape"), not op.whole("allowzero", 0)
    if not zero and (0, 0) in wanted:
        raise op.wrong("a shape contains 0")
    return reshape(at, op, at.value(op), wanted, zero)


@emitter(L.MergeIntoBatch)
def write_merge_into_batch(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.reshape(x, (-1, *layer.output_shape))


@emitter(L.SplitFromBatch)
def write_split_from_batch(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.reshape(x, (-1, *layer.output_shape))


@operator("Flatten")
def read_flatten(at: Importer, op: Operation) -> Value:
    return flatten(at, op, at.value(op), op.whole("axis", 1))


@operator("Squeeze")
def read_squeeze(at: Importer, op: Operation) -> Value:
    return squeeze(at, op, at.value(op), at.numbers(op, 1, "axes"))


@operator("Unsqueeze")
def read_unsqueeze(at: Importer, op: Operation) -> Value:
    axes = at.numbers(op, 1, "axes")
    if axes is None or len(axes) > 8:
        raise op.wrong("its axes are missing, or there are too many")
    return unsqueeze(at, op, at.value(op), axes)


@emitter(L.Permute)
def write_permute(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Transpose", [x], perm=layer.dims)


@operator("Transpose")
def read_transpose(at: Importer, op: Operation) -> Value:
    x, order = at.value(op), op.ints("perm")
    order = list(range(x.rank))[::-1] if order is None else order
    if sorted(order) != list(range(x.rank)):
        raise op.wrong(f"perm must contain each of {x.rank} axes once, got {brief(order)}")
    return transpose(at, op, x, order)


@emitter(L.Pad)
def write_pad(graph: GraphBuilder, layer: Any, x: str) -> str:
    mode = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}[
        layer.mode
    ]
    if mode == "wrap" and graph.opset < 19:
        raise ArgumentError(f"circular padding needs opset 19 or newer, got {graph.opset}")
    sides = [0, *(before for before, _ in layer.pads), 0, *(after for _, after in layer.pads)]
    value = [graph.constant(float(layer.value))] if layer.value else []
    return graph.add("Pad", [x, graph.constant(sides, dtype="int64"), *value], mode=mode)


@operator("Pad")
def read_pad(at: Importer, op: Operation) -> Any:
    x = at.value(op)
    mode = op.word("mode", "constant")
    modes = {"constant": "zeros", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise op.wrong(f"mode must be one of {', '.join(modes)}; got {mode[:80]!r}")
    given = at.numbers(op, 1, "pads" if op.has("pads") else "paddings")
    axes = at.numbers(op, 3)
    chosen = list(range(x.rank)) if axes is None else plain_axes(op, axes, x.rank)
    if given is None or len(given) != 2 * len(chosen) or any(abs(n) >= 1 << 31 for n in given):
        raise op.wrong(
            f"pads must be 2 numbers for each of {len(chosen)} axes, got {brief(given or [])}"
        )
    value = at.number(op, 2, "value", 0.0)
    pads = [[0, 0] for _ in range(x.rank)]
    for i, axis in enumerate(chosen):
        pads[axis] = [given[i], given[i + len(chosen)]]
    if any(pads[0]):
        raise op.wrong("it adds samples to the batch (axis 0)")
    if any(n < 0 for pair in pads for n in pair):  # cells to remove, before the others are padded
        parts = {
            axis: (max(0, -before), n - max(0, -after), 1)
            for axis, (n, (before, after)) in enumerate(zip(x.shape, pads[1:], strict=True), 1)
        }
        if any(start >= stop for start, stop, _ in parts.values()):
            raise op.wrong(f"pads {brief(given)} leave nothing of samples {brief(x.shape)}")
        x, pads = _cut(at, op, x, parts), [[max(0, n) for n in pair] for pair in pads]
    if not any(map(any, pads)):
        return x
    return at.add(op, L.Pad(pads[1:], modes[mode], value or 0.0 if mode == "constant" else 0.0), x)


@emitter(PadChannels)
def write_pad_channels(graph: GraphBuilder, layer: Any, x: str) -> str:
    more = layer.out_channels - layer.input_shape[0]
    pads = [(0, 0), (more // 2, more - more // 2), *((0, 0) for _ in layer.input_shape[1:])]
    return graph.add("Pad", [x, graph.constant(sides(pads), dtype="int64")]) if more else x


@emitter(L.Slice)
def write_slice(graph: GraphBuilder, layer: Any, x: str) -> str:
    axes = range(1, len(layer.starts) + 1)
    numbers = (layer.starts, layer.stops, list(axes), layer.steps)
    return graph.add("Slice", [x, *(graph.constant(list(row), dtype="int64") for row in numbers)])


@emitter(L.Crop, L.CenterCrop)
def write_crop(graph: GraphBuilder, layer: Any, x: str) -> str:
    cells = layer.kept_of(layer.input_shape[1:])
    numbers = ([part.start for part in cells], [part.stop for part in cells])
    axes = list(range(2, len(cells) + 2))
    return graph.add(
        "Slice", [x, *(graph.constant(list(row), dtype="int64") for row in (*numbers, axes))]
    )


@operator("Slice")
def read_slice(at: Importer, op: Operation) -> Any:
    starts, ends = at.numbers(op, 1, "starts"), at.numbers(op, 2, "ends")
    if starts is None or ends is None:
        raise op.wrong("starts or ends are missing")
    axes = at.numbers(op, 3, "axes")
    axes = list(range(len(starts))) if axes is None else axes
    steps = at.numbers(op, 4)
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise op.wrong("starts, ends, axes and steps have different lengths")
    x = at.value(op)
    parts, turned = {}, {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if axis in (0, -x.rank) and (start, step) == (0, 1) and end >= (at.batch or (1 << 31) - 1):
            continue  # all samples
        axis = at.axis(op, axis, x.rank)
        start, stop, step = slice(start, end, step).indices(x.shape[axis - 1])
        cells = range(start, stop, step)
        if not cells or axis in parts or axis in turned:
            raise op.wrong(f"axis {axis} would be empty, or is given twice")
        if step > 0:
            parts[axis] = (start, stop, step)
        else:
            turned[axis] = cells
    y = _cut(at, op, x, parts) if parts else x
    for axis, cells in turned.items():
        y = at.add(op, L.Take(list(cells), axis), y)
    return y


@operator("Split")
def read_split(at: Importer, op: Operation) -> list[Any]:
    x = at.value(op)
    axis = at.axis(op, op.whole("axis", 0), x.rank)
    size, count = x.shape[axis - 1], len(op.outputs)
    sizes = at.numbers(op, 1, "split")
    if op.has("num_outputs") and op.whole("num_outputs", 0) != count:
        raise op.wrong("num_outputs must be the number of its outputs")
    if sizes is None:
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
    if len(sizes) != count or any(n < 1 for n in sizes) or sum(sizes) != size:
        raise op.wrong(f"{size} elements cannot be split into {brief(sizes)} for {count} outputs")
    ends = [0]
    for n in sizes:
        ends.append(ends[-1] + n)
    return [_cut(at, op, x, {axis: (first, last, 1)}) for first, last in pairwise(ends)]


def _cut(at: Importer, op: Operation, x: Value, parts: dict[int, tuple[int, int, int]]) -> Value:
    """Add a slice of some axes: (start, stop, step) of each."""
    whole = [parts.get(axis, (0, n, 1)) for axis, n in enumerate(x.shape, 1)]
    starts, stops, steps = zip(*whole, strict=True)
    return at.add(op, L.Slice(starts, stops, steps), x)


@emitter(L.Take)
def write_take(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add(
        "Gather", [x, graph.constant(list(layer.indices), dtype="int64")], axis=layer.axis
    )


@operator("Gather")
def read_gather(at: Importer, op: Operation) -> Value:
    """Add a selection of elements by known indices; their axis becomes the index array's axes."""
    x, known = at.value(op), at.known(op, 1)
    indices, axis = at.numbers(op, 1) or [], at.axis(op, op.whole("axis", 0), x.rank)
    size = x.shape[axis - 1]
    if (
        known is None
        or not all(-size <= i < size for i in indices)
        or x.rank + known.array.ndim > 16
    ):
        raise op.wrong(f"indices {brief(indices)} are beyond the {size} elements of axis {axis}")
    y = at.add(op, L.Take([i % size for i in indices], axis), x)
    return at.reshaped(op, y, (*x.shape[: axis - 1], *known.array.shape, *x.shape[axis:]))


@operator("GatherND")
def read_gather_nd(at: Importer, op: Operation) -> Value:
    """Read a selection by known indices, which are the same for each sample: the elements of a
    sample are numbered, and the numbers selected."""
    x, known = at.value(op), at.known(op, 1)
    shared = op.whole("batch_dims", 0)
    if known is None or known.array.dtype.kind not in "iu" or not known.array.ndim:
        raise op.wrong("its indices are missing, or not whole numbers")
    indices = known.array
    if not 1 <= shared < min(indices.ndim, x.rank) or (indices[:1] != indices).any():
        raise op.wrong("it operates on the batch (axis 0): batch_dims must be 1 or more")
    indices, depth = indices[0], indices.shape[-1]
    inner, sizes = x.shape[: shared - 1], x.shape[shared - 1 : shared - 1 + depth]
    if indices.shape[: shared - 1] != inner or len(sizes) != depth or not depth:
        raise op.wrong(f"indices {brief(known.array.shape)} do not fit {brief(x.shape)}")
    if (indices < [-n for n in sizes]).any() or (indices >= list(sizes)).any():
        raise op.wrong(f"indices are beyond axes {brief(sizes)}")
    if prod(x.shape) > _MOST_NUMBERED:
        raise op.wrong(f"samples {brief(x.shape)} have more than {_MOST_NUMBERED} elements")
    numbered = np.arange(prod(x.shape)).reshape(x.shape)
    places = [
        grid.reshape(grid.shape + (1,) * (indices.ndim - 1 - grid.ndim))
        for grid in np.ogrid[tuple(slice(n) for n in inner)]
    ]
    chosen = numbered[(*places, *np.moveaxis(indices, -1, 0))]
    flat = at.reshaped(op, x, (prod(x.shape),))
    y = at.add(op, L.Take(chosen.reshape(-1).tolist(), 1), flat)
    return at.reshaped(op, y, chosen.shape)


_MOST_NUMBERED = 1 << 22


@operator("Tile")
def read_tile(at: Importer, op: Operation) -> Value:
    x, repeats = at.value(op), at.numbers(op, 1)
    if repeats is None or len(repeats) != x.rank or not all(1 <= n <= 1 << 16 for n in repeats):
        raise op.wrong(f"expected {x.rank} repeats of at least 1, got {brief(repeats or [])}")
    if repeats[0] != 1:
        raise op.wrong("it adds samples to the batch (axis 0)")
    for axis, (n, times) in enumerate(zip(x.shape, repeats[1:], strict=True), 1):
        if times > 1 and n * times <= 1 << 17:
            x = at.add(op, L.Take(list(range(n)) * times, axis), x)
        elif times > 1:
            raise op.wrong(f"axis {axis} of {n} elements is repeated {times} times")
    return x


@emitter(L.Expand)
def write_expand(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Expand", [x, graph.constant([1, *layer.shape], dtype="int64")])


@operator("Expand")
def read_expand(at: Importer, op: Operation) -> Any:
    wanted = at.numbers(op, 1)
    x = at.value(op)
    if wanted is None or len(wanted) > x.rank:
        raise op.wrong(f"expected at most {x.rank} sizes, got {brief(wanted or [])}")
    first, *sizes = [1] * (x.rank - len(wanted)) + wanted
    if first not in (1, BATCH, at.batch):
        raise op.wrong(f"sizes {brief(wanted)} expand the batch (axis 0)")
    shape = [n if m == 1 else m for n, m in zip(x.shape, sizes, strict=True)]
    return x if tuple(shape) == x.shape else at.add(op, L.Expand(shape), x)


_REDUCTIONS = {
    "ReduceL1": "l1",
    "ReduceL2": "l2",
    "ReduceLogSum": "log_sum",
    "ReduceLogSumExp": "log_sum_exp",
    "ReduceMax": "max",
    "ReduceMean": "mean",
    "ReduceMin": "min",
    "ReduceProd": "prod",
    "ReduceSum": "sum",
    "ReduceSumSquare": "sum_square",
}


@emitter(L.Reduce)
def write_reduce(graph: GraphBuilder, layer: Any, x: str) -> str:
    name = next(name for name, kind in _REDUCTIONS.items() if kind == layer.reduction)
    y = graph.reduce(name, x, layer.axes)
    return y if layer.keepdims else graph.reshape(y, (0, *layer.output_shape))


@operator(*_REDUCTIONS)
def read_reduce(at: Importer, op: Operation) -> Any:
    x = at.value(op)
    axes, kept = at.numbers(op, 1, "axes"), bool(op.whole("keepdims", 1))
    if not axes:
        if op.whole("noop_with_empty_axes", 0):
            return x
        axes = range(x.rank)  # type: ignore[assignment]
    op.ignore("noop_with_empty_axes")
    axes = sorted(at.axes(op, axes or [], x.rank))
    if op.kind == "ReduceMean" and x.rank > 2 and axes == list(range(2, x.rank)):
        return at.add(op, L.GlobalAvgPool(flatten=not kept), x)
    return at.add(op, L.Reduce(_REDUCTIONS[op.kind], axes, kept), x)
