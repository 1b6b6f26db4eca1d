"""Convolutions.

Notation: N batch, C channels, S/OUT the spatial axes in/out.
"""

from collections.abc import Sequence
from typing import Any

from portacnn import layers as L
from portacnn.models.lenet5 import TableConv2d
from portacnn.onnx.builder import GraphBuilder, Pads, bias_of, emitter, sides
from portacnn.onnx.importer import (
    Importer,
    Known,
    Value,
    operator,
    some,
    spatial_axes,
)
from portacnn.onnx.reading import Operation, brief
from portacnn.ops.windows import pads_of
from portacnn.runtime import HostArray


@emitter(L.Conv1d, L.Conv2d, L.Conv3d)
def write_conv(graph: GraphBuilder, layer: Any, x: str) -> str:
    pads = pads_of(
        layer.padding, layer.input_shape[1:], layer.kernel_size, layer.stride, layer.dilation
    )
    if layer.padding_mode != "zeros":
        x, pads = _pad(graph, x, layer.input_shape, pads, layer.padding_mode), ((0, 0),) * len(pads)
    return graph.add(
        "Conv",
        [x, graph.weight(layer, "weight"), *bias_of(graph, layer)],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=sides(pads),
        dilations=layer.dilation,
        group=layer.groups,
    )


@operator("Conv")
def read_conv(at: Importer, op: Operation) -> Value:
    x, weight, bias, kernel, strides, dilations = _convolution(at, op)
    kind = (L.Conv1d, L.Conv2d, L.Conv3d)[len(kernel) - 1]
    layer = kind(
        x.shape[0],
        weight.array.shape[0],
        kernel,
        strides,
        _simple(padding_of(at, op, x, kernel, strides, dilations)),
        dilations,
        _group(op),
        bias is not None,
    )
    return at.add(op, layer, x, weight=weight, **some(bias=bias))


@emitter(L.ConvTranspose1d, L.ConvTranspose2d, L.ConvTranspose3d)
def write_conv_transpose(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write ConvTranspose. onnxruntime does not support an output padding of the stride or more;
    then Pad and Slice nodes follow."""
    pads = pads_of(
        layer.padding, layer.input_shape[1:], layer.kernel_size, layer.stride, layer.dilation
    )
    refused = any(extra >= s for extra, s in zip(layer.output_padding, layer.stride, strict=True))
    weight, bias = graph.weight(layer, "weight"), bias_of(graph, layer)
    y = graph.add(
        "ConvTranspose",
        [x, weight, *([] if refused else bias)],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=None if refused else sides(pads),
        output_padding=None if refused else layer.output_padding,
        dilations=layer.dilation,
        group=layer.groups,
    )
    if not refused:
        return y
    more = sides([(0, 0), (0, 0), *((0, extra) for extra in layer.output_padding)])
    y = graph.add("Pad", [y, graph.constant(more, dtype="int64")])
    for axis, ((before, _), n) in enumerate(zip(pads, layer.output_shape[1:], strict=True), 2):
        y = _slice(graph, y, axis, before, before + n)
    return graph.add("Add", [y, graph.reshape(bias[0], (-1, *(1 for _ in pads)))]) if bias else y


@operator("ConvTranspose")
def read_conv_transpose(at: Importer, op: Operation) -> Value:
    x, weight, bias, kernel, strides, dilations = _convolution(at, op)
    axes = len(kernel)
    kind = (L.ConvTranspose1d, L.ConvTranspose2d, L.ConvTranspose3d)[axes - 1]
    groups, extra = _group(op), op.sizes("output_padding", axes, 0, 0)
    auto = op.word("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER") or op.has("output_shape"):
        wanted = op.ints("output_shape") or [
            n * s for n, s in zip(x.shape[1:], strides, strict=True)
        ]
        if len(wanted) == axes + 2:  # with batch and channels, as some tools write it
            wanted = wanted[2:]
        if len(wanted) != axes:
            raise op.wrong(f"output_shape must be {axes} numbers, got {brief(wanted)}")
        op.ignore("pads")
        pads = []
        for i, (n, s, k, d) in enumerate(zip(x.shape[1:], strides, kernel, dilations, strict=True)):
            total = s * (n - 1) + extra[i] + (k - 1) * d + 1 - wanted[i]
            if total < 0:  # the output is larger than the windows cover: pad at the end
                extra[i], total = extra[i] - total, 0
            half = total // 2
            pads.append((half, total - half) if auto == "SAME_UPPER" else (total - half, half))
    else:
        pads = padding_of(at, op, x, kernel, strides, dilations)
    layer = kind(
        x.shape[0],
        weight.array.shape[1] * groups,
        kernel,
        strides,
        _simple(pads),
        extra,
        groups,
        bias is not None,
        dilations,
    )
    return at.add(op, layer, x, weight=weight, **some(bias=bias))


@emitter(TableConv2d)
def write_table_conv(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write a full convolution: the table's kernels, and zeros for missing connections."""

    def full() -> HostArray:
        kernels = layer.home.to_host(layer.params["weight"])
        wide = kernels[:1].repeat(len(layer.table) * layer.input_shape[0], 0)
        wide = wide.reshape(len(layer.table), layer.input_shape[0], *layer.kernel_size)
        wide[...] = 0
        for kernel, (o, c) in zip(kernels, layer.connections, strict=True):
            wide[o, c] = kernel
        return wide

    weight = graph.stored_once(layer.full_name("weight"), full)
    return graph.add(
        "Conv", [x, weight, graph.weight(layer, "bias")], kernel_shape=layer.kernel_size
    )


def _pad(graph: GraphBuilder, x: str, sample: Sequence[int], pads: Pads, mode: str) -> str:
    """Add margins to x's spatial axes, filled with values from inside."""
    if mode != "circular" or graph.opset >= 19:
        word = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
        amounts = graph.constant(sides([(0, 0), (0, 0), *pads]), dtype="int64")
        return graph.add("Pad", [x, amounts], mode=word)
    for axis, (n, (before, after)) in enumerate(zip(sample[1:], pads, strict=True), 2):
        margins = [_slice(graph, x, axis, n - before, n)] if before else []
        beyond = [_slice(graph, x, axis, 0, after)] if after else []
        if margins or beyond:
            x = graph.add("Concat", [*margins, x, *beyond], axis=axis)
    return x


def _slice(graph: GraphBuilder, x: str, axis: int, start: int, end: int) -> str:
    return graph.add(
        "Slice", [x, *(graph.constant([n], dtype="int64") for n in (start, end, axis))]
    )


def _convolution(
    at: Importer, op: Operation
) -> tuple[Value, Known, Known | None, list[int], list[int], list[int]]:
    """Return x, weight, bias, kernel, strides, dilations."""
    x, weight, bias = at.value(op), at.weight(op, 1), at.optional_weight(op, 2)
    axes = spatial_axes(at, op, x)
    if weight.array.ndim != axes + 2 or 0 in weight.array.shape:
        raise op.wrong(
            f"a weight {brief(weight.array.shape)} does not fit samples {brief(x.shape)}"
        )
    kernel = list(weight.array.shape[2:])
    if op.has("kernel_shape") and op.ints("kernel_shape") != kernel:
        raise op.wrong(f"kernel_shape must be that of the weight, {brief(kernel)}")
    return (
        x,
        weight,
        bias,
        kernel,
        op.sizes("strides", axes, 1, 1),
        op.sizes("dilations", axes, 1, 1),
    )


def padding_of(
    at: Importer,
    op: Operation,
    x: Value,
    kernel: Sequence[int],
    strides: list[int],
    dilations: list[int],
) -> Any:
    """Return the padding (before, after) of each spatial axis."""
    auto, axes = op.word("auto_pad", "NOTSET"), len(kernel)
    pads = op.sizes("pads", 2 * axes, 0, 0)
    given = list(zip(pads[:axes], pads[axes:], strict=True))
    if auto == "NOTSET":
        return given
    if auto not in ("VALID", "SAME_UPPER", "SAME_LOWER"):
        raise op.wrong(
            f"auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {auto[:80]!r}"
        )
    pairs = [(0, 0)] * axes
    if auto != "VALID":
        pairs = list(pads_of("same", x.shape[1:], kernel, strides, dilations))
        pairs = pairs if auto == "SAME_UPPER" else [(after, before) for before, after in pairs]
    if op.has("pads") and pairs != given:  # runtimes differ on which one they use
        raise op.wrong(
            f"auto_pad={auto} means {brief(pairs)}, but pads are {brief(given)}; only one may be "
            "given"
        )
    return pairs


def _group(op: Operation) -> int:
    groups = op.whole("group", 1)
    if not 1 <= groups < 1 << 31:
        raise op.wrong(f"group must be at least 1, got {groups}")
    return groups


def _simple(pads: Sequence[tuple[int, int]]) -> Any:
    """Return one number per axis if the two sides are equal."""
    return (
        [before for before, _ in pads]
        if all(before == after for before, after in pads)
        else [list(p) for p in pads]
    )
