"""Pooling.

Notation: S/OUT the spatial axes in/out.
"""

from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Any

from portacnn import layers as L
from portacnn.errors import ArgumentError
from portacnn.onnx.builder import GraphBuilder, emitter, sides
from portacnn.onnx.importer import (
    Importer,
    Value,
    operator,
    spatial_axes,
)
from portacnn.onnx.layers.conv import padding_of
from portacnn.onnx.reading import Operation
from portacnn.ops.adaptive import shares_of
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows


@emitter(L.MaxPool1d, L.MaxPool2d, L.MaxPool3d)
def write_max_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    windows, pads = _windows(layer)
    if any(max(pair) >= k for pair, k in zip(pads, windows.kernel, strict=True)):
        # A dilated kernel may need such padding. onnxruntime requires padding below the undilated
        # kernel size.
        amounts = graph.constant(sides([(0, 0), (0, 0), *pads]), dtype="int64")
        x = graph.add("Pad", [x, amounts, graph.constant(-float("inf"))])
        pads = [(0, 0)] * len(pads)
    return graph.add(
        "MaxPool",
        [x],
        kernel_shape=windows.kernel,
        strides=windows.stride,
        pads=sides(pads),
        dilations=windows.dilation,
    )


@emitter(L.AvgPool1d, L.AvgPool2d, L.AvgPool3d)
def write_avg_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    windows, pads = _windows(layer)
    cells = prod(windows.kernel)
    inside = not layer.count_include_pad and layer.divisor_override is None
    if max(windows.dilation) > 1 and graph.opset < 19:
        raise ArgumentError(
            f"average pooling with dilation needs opset 19 or newer, got {graph.opset}"
        )
    y = graph.add(
        "AveragePool",
        [x],
        kernel_shape=windows.kernel,
        strides=windows.stride,
        pads=sides(pads),
        dilations=windows.dilation if max(windows.dilation) > 1 else None,
        count_include_pad=0 if inside else 1,
    )
    if layer.divisor_override is not None:
        return graph.add("Mul", [y, graph.constant(cells / layer.divisor_override)])
    if inside:
        return y
    counts = _cells_in_padding(windows)
    if all(count == cells for count in counts):
        return y
    return graph.add("Mul", [y, graph.constant([cells / count for count in counts], windows.out)])


@operator("MaxPool", "AveragePool")
def read_pool(at: Importer, op: Operation) -> Value:
    x = at.value(op)
    axes = spatial_axes(at, op, x)
    if not op.has("kernel_shape"):
        raise op.wrong("kernel_shape is missing")
    kernel = op.sizes("kernel_shape", axes, 1, 1)
    strides, dilations = op.sizes("strides", axes, 1, 1), op.sizes("dilations", axes, 1, 1)
    pads = [list(pair) for pair in padding_of(at, op, x, kernel, strides, dilations)]
    ceil = bool(op.whole("ceil_mode", 0))
    if op.kind == "MaxPool":
        op.ignore("storage_order")  # of the second output
        most = (L.MaxPool1d, L.MaxPool2d, L.MaxPool3d)[axes - 1]
        return at.add(op, most(kernel, strides, _narrow(pads, kernel), dilations, ceil), x)
    counted = bool(op.whole("count_include_pad", 0))
    mean = (L.AvgPool1d, L.AvgPool2d, L.AvgPool3d)[axes - 1]
    return at.add(
        op, mean(kernel, strides, _narrow(pads, kernel), ceil, counted, None, dilations), x
    )


_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _windows(layer: Any) -> tuple[Windows, list[tuple[int, int]]]:
    """Return the layer's windows, and the padding that contains all windows.

    Padding is explicit because implementations of ``ceil_mode`` differ.
    """
    size = layer.input_shape[1:]
    windows = pool_windows(
        size, **{name: value for name, value in layer.geometry().items() if name in _GEOMETRY}
    )
    pads = [
        (before, max(0, (out - 1) * s + d * (k - 1) + 1 - n - before))
        for n, k, s, d, out, (before, _) in zip(
            size,
            windows.kernel,
            windows.stride,
            windows.dilation,
            windows.out,
            windows.pads,
            strict=True,
        )
    ]
    return windows, pads


def _cells_in_padding(windows: Windows) -> list[int]:
    """Return the number of elements of each window in the padded input, row by row.

    Elements beyond its end do not count.
    """
    on_axes = [
        [min(k, -(-(before + n + after - o * s) // d)) for o in range(out)]
        for n, k, s, d, out, (before, after) in zip(
            windows.size,
            windows.kernel,
            windows.stride,
            windows.dilation,
            windows.out,
            windows.pads,
            strict=True,
        )
    ]
    return [prod(cells) for cells in product(*on_axes)]


def _narrow(pads: list[list[int]], kernel: Sequence[int]) -> Any:
    """Return padding in PyTorch's form, if it has one."""
    plain = all(before == after <= k // 2 for (before, after), k in zip(pads, kernel, strict=True))
    return [before for before, _ in pads] if plain else pads


@emitter(L.AdaptiveAvgPool1d, L.AdaptiveAvgPool2d, L.AdaptiveAvgPool3d)
def write_adaptive_avg_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    return _adaptive_pool(graph, layer, x, "Average")


@emitter(L.AdaptiveMaxPool1d, L.AdaptiveMaxPool2d, L.AdaptiveMaxPool3d)
def write_adaptive_max_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    return _adaptive_pool(graph, layer, x, "Max")


def _adaptive_pool(graph: GraphBuilder, layer: Any, x: str, kind: str) -> str:
    size, out = layer.input_shape[1:], layer.output_shape[1:]
    if size == out:
        return x
    if prod(out) == 1:
        return graph.add(f"Global{kind}Pool", [x])
    if all(n % m == 0 for n, m in zip(size, out, strict=True)):
        each = [n // m for n, m in zip(size, out, strict=True)]
        return graph.add(f"{kind}Pool", [x], kernel_shape=each, strides=each)
    for axis, (n, m) in enumerate(zip(size, out, strict=True), 2):
        if n != m:
            x = _shares_of_axis(graph, x, axis, shares_of(n, m), len(layer.input_shape) + 1, kind)
    return x


def _shares_of_axis(
    graph: GraphBuilder, x: str, axis: int, parts: Sequence[tuple[int, int]], axes: int, kind: str
) -> str:
    """Pool the adaptive windows of one axis. Windows become rows, padded to equal length.

    Padding elements do not affect the mean or the maximum.
    """
    longest = max(end - start for start, end in parts)
    cells = [min(start + i, end - 1) for start, end in parts for i in range(longest)]
    # one more axis
    y = graph.add("Gather", [x, graph.constant(cells, (len(parts), longest), "int64")], axis=axis)
    if longest > 1:
        if kind == "Max":
            y = graph.reduce("ReduceMax", y, [axis + 1])
        else:
            weights = [
                1 / (end - start) if start + i < end else 0.0
                for start, end in parts
                for i in range(longest)
            ]
            shape = (len(parts), longest, *(1,) * (axes - axis - 1))
            y = graph.reduce(
                "ReduceSum", graph.add("Mul", [y, graph.constant(weights, shape)]), [axis + 1]
            )
    return graph.add("Squeeze", [y, graph.constant([axis + 1], dtype="int64")])


@emitter(L.GlobalAvgPool)
def write_global_avg_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    return _global_pool(graph, layer, x, "GlobalAveragePool", "ReduceMean")


@emitter(L.GlobalMaxPool)
def write_global_max_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    return _global_pool(graph, layer, x, "GlobalMaxPool", "ReduceMax")


def _global_pool(graph: GraphBuilder, layer: Any, x: str, pool: str, reduce: str) -> str:
    axes = range(2, len(layer.input_shape) + 1)
    # onnxruntime supports up to three spatial axes
    y = graph.add(pool, [x]) if len(axes) <= 3 else graph.reduce(reduce, x, list(axes))
    return graph.add("Flatten", [y], axis=1) if layer.flatten else y


@operator("GlobalAveragePool", "GlobalMaxPool")
def read_global_pool(at: Importer, op: Operation) -> Value:
    return at.add(
        op, L.GlobalAvgPool() if op.kind == "GlobalAveragePool" else L.GlobalMaxPool(), at.value(op)
    )
