"""Emitters of portacnn's layers: one per layer, or one for several similar layers.

All sizes except the batch are known when a network is exported. So choices that ONNX leaves to the
runtime are written explicitly: paddings as numbers, a window that extends over the end
(``ceil_mode``) as padding. If onnxruntime does not support what the standard allows, the workaround
is always used, and documented.

Notation: N batch, C channels, S/OUT the spatial axes in/out. Emitters take the graph, the layer and
the name of its input, and return the name of its output (see ``builder``).
"""

from collections.abc import Sequence
from itertools import product
from math import prod, sqrt
from typing import Any

from portacnn.errors import ArgumentError
from portacnn.layers import (
    ELU,
    GELU,
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool1d,
    AvgPool2d,
    AvgPool3d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Branches,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    Flatten,
    GlobalAvgPool,
    GlobalMaxPool,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LeakyReLU,
    Linear,
    LocalResponseNorm,
    LogSoftmax,
    MaxPool1d,
    MaxPool2d,
    MaxPool3d,
    Recompute,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from portacnn.models.lenet5 import ScaledTanh, TableConv2d
from portacnn.models.model import Model
from portacnn.models.resnet import PadChannels
from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.ops.adaptive import shares_of
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows, pads_of
from portacnn.runtime import HostArray

Pads = Sequence[tuple[int, int]]


def _sides(pads: Pads) -> list[int]:
    """Return ((before, after), ...) in ONNX's order: all befores, then all afters."""
    return [before for before, _ in pads] + [after for _, after in pads]


def _bias(graph: GraphBuilder, layer: Any) -> list[str]:
    return [graph.weight(layer, "bias")] if "bias" in layer.params else []


# --- containers: of their children, whether or not some of those run as one -----------------------


@emitter(Sequential, Model)
def sequential(graph: GraphBuilder, layer: Any, x: str) -> str:
    for child in layer.children.values():
        x = graph.layer(child, x)
    return x


@emitter(Residual)
def residual(graph: GraphBuilder, layer: Any, x: str) -> str:
    y = graph.layer(layer.body, x)
    short = x if layer.shortcut is None else graph.layer(layer.shortcut, x)
    y = graph.add("Add", [y, short])
    return y if layer.activation is None else graph.layer(layer.activation, y)


@emitter(Recompute)
def recompute(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.layer(layer.layer, x)


@emitter(Branches)
def branches(graph: GraphBuilder, layer: Any, x: str) -> str:
    parts = [graph.layer(child, x) for child in layer.children.values()]
    return graph.add("Sum", parts) if layer.join == "add" else graph.add("Concat", parts, axis=1)


# --- convolution and affine maps ------------------------------------------------------------------


@emitter(Conv1d, Conv2d, Conv3d)
def conv(graph: GraphBuilder, layer: Any, x: str) -> str:
    pads = pads_of(
        layer.padding, layer.input_shape[1:], layer.kernel_size, layer.stride, layer.dilation
    )
    if layer.padding_mode != "zeros":
        x, pads = _pad(graph, x, layer.input_shape, pads, layer.padding_mode), ((0, 0),) * len(pads)
    return graph.add(
        "Conv",
        [x, graph.weight(layer, "weight"), *_bias(graph, layer)],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=_sides(pads),
        dilations=layer.dilation,
        group=layer.groups,
    )


def _pad(graph: GraphBuilder, x: str, sample: Sequence[int], pads: Pads, mode: str) -> str:
    """Add margins to x's spatial axes, filled with values from inside."""
    if mode != "circular" or graph.opset >= 19:
        word = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode]
        amounts = graph.constant(_sides([(0, 0), (0, 0), *pads]), dtype="int64")
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


@emitter(ConvTranspose1d, ConvTranspose2d, ConvTranspose3d)
def conv_transpose(graph: GraphBuilder, layer: Any, x: str) -> str:
    """onnxruntime requires an output padding below the stride; a larger one is added by separate
    nodes."""
    pads = pads_of(
        layer.padding, layer.input_shape[1:], layer.kernel_size, layer.stride, layer.dilation
    )
    refused = any(extra >= s for extra, s in zip(layer.output_padding, layer.stride, strict=True))
    weight, bias = graph.weight(layer, "weight"), _bias(graph, layer)
    y = graph.add(
        "ConvTranspose",
        [x, weight, *([] if refused else bias)],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        pads=None if refused else _sides(pads),
        output_padding=None if refused else layer.output_padding,
        dilations=layer.dilation,
        group=layer.groups,
    )
    if not refused:
        return y
    more = _sides([(0, 0), (0, 0), *((0, extra) for extra in layer.output_padding)])
    y = graph.add("Pad", [y, graph.constant(more, dtype="int64")])
    for axis, ((before, _), n) in enumerate(zip(pads, layer.output_shape[1:], strict=True), 2):
        y = _slice(graph, y, axis, before, before + n)
    return graph.add("Add", [y, graph.reshape(bias[0], (-1, *(1 for _ in pads)))]) if bias else y


@emitter(TableConv2d)
def table_conv(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Written as a full convolution, with zeros where the table has no kernel."""

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


@emitter(Linear)
def linear(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Gemm", [x, graph.weight(layer, "weight"), *_bias(graph, layer)], transB=1)


@emitter(Flatten)
def flatten(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Flatten", [x], axis=1)


@emitter(PadChannels)
def pad_channels(graph: GraphBuilder, layer: Any, x: str) -> str:
    more = layer.out_channels - layer.input_shape[0]
    pads = [(0, 0), (more // 2, more - more // 2), *((0, 0) for _ in layer.input_shape[1:])]
    return graph.add("Pad", [x, graph.constant(_sides(pads), dtype="int64")]) if more else x


# --- pooling --------------------------------------------------------------------------------------


_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _windows(layer: Any) -> tuple[Windows, list[tuple[int, int]]]:
    """Return the layer's windows, and the padding with which all windows lie inside the input.

    Explicit padding means the same everywhere; implementations differ on ``ceil_mode``.
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


@emitter(MaxPool1d, MaxPool2d, MaxPool3d)
def max_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    windows, pads = _windows(layer)
    if any(max(pair) >= k for pair, k in zip(pads, windows.kernel, strict=True)):
        # A dilated kernel may ask for it. onnxruntime wants each padding below the kernel, dilated
        # or not.
        amounts = graph.constant(_sides([(0, 0), (0, 0), *pads]), dtype="int64")
        x = graph.add("Pad", [x, amounts, graph.constant(-float("inf"))])
        pads = [(0, 0)] * len(pads)
    return graph.add(
        "MaxPool",
        [x],
        kernel_shape=windows.kernel,
        strides=windows.stride,
        pads=_sides(pads),
        dilations=windows.dilation,
    )


@emitter(AvgPool1d, AvgPool2d, AvgPool3d)
def avg_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
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
        pads=_sides(pads),
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


@emitter(AdaptiveAvgPool1d, AdaptiveAvgPool2d, AdaptiveAvgPool3d)
def adaptive_avg_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    return _adaptive_pool(graph, layer, x, "Average")


@emitter(AdaptiveMaxPool1d, AdaptiveMaxPool2d, AdaptiveMaxPool3d)
def adaptive_max_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
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
    """Pool each share of one axis. Shares are rows, padded to equal length.

    A padding element does not count in a mean, and does not change a maximum.
    """
    longest = max(end - start for start, end in parts)
    cells = [min(start + i, end - 1) for start, end in parts for i in range(longest)]
    # an axis more
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


@emitter(GlobalAvgPool)
def global_avg_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    return _global_pool(graph, layer, x, "GlobalAveragePool", "ReduceMean")


@emitter(GlobalMaxPool)
def global_max_pool(graph: GraphBuilder, layer: Any, x: str) -> str:
    return _global_pool(graph, layer, x, "GlobalMaxPool", "ReduceMax")


def _global_pool(graph: GraphBuilder, layer: Any, x: str, pool: str, reduce: str) -> str:
    axes = range(2, len(layer.input_shape) + 1)
    # onnxruntime pools up to three
    y = graph.add(pool, [x]) if len(axes) <= 3 else graph.reduce(reduce, x, list(axes))
    return graph.add("Flatten", [y], axis=1) if layer.flatten else y


# --- normalization --------------------------------------------------------------------------------


def _scale_and_bias(graph: GraphBuilder, layer: Any) -> list[str]:
    """Return weight and bias of the channels; ones and zeros if there are none."""
    channels = layer.input_shape[0]
    if "weight" in layer.params:
        return [graph.weight(layer, "weight"), graph.weight(layer, "bias")]
    return [graph.constant([1.0] * channels), graph.constant([0.0] * channels)]


@emitter(BatchNorm1d, BatchNorm2d, BatchNorm3d)
def batch_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    if layer.track_running_stats:
        return _by_running_statistics(graph, layer, x)
    spatial = range(2, len(layer.input_shape) + 1)
    y = _normalized(graph, x, [0, *spatial], layer.eps)
    return _affine(graph, layer, y, (layer.input_shape[0], *(1 for _ in spatial)))


@emitter(InstanceNorm1d, InstanceNorm2d, InstanceNorm3d)
def instance_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    if layer.track_running_stats:
        return _by_running_statistics(graph, layer, x)
    return graph.add(
        "InstanceNormalization", [x, *_scale_and_bias(graph, layer)], epsilon=layer.eps
    )


def _by_running_statistics(graph: GraphBuilder, layer: Any, x: str) -> str:
    scale, bias = _scale_and_bias(graph, layer)
    mean, var = (graph.weight(layer, name) for name in ("running_mean", "running_var"))
    return graph.add(
        "BatchNormalization",
        [x, scale, bias, mean, var],
        epsilon=layer.eps,
        # ONNX's is the share that stays
        momentum=None if layer.momentum is None else 1.0 - layer.momentum,
    )


@emitter(GroupNorm)
def group_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Written as instance norm of the groups: ONNX's GroupNormalization is consistent only from
    opset 21 on."""
    groups, (channels, *size) = layer.num_groups, layer.input_shape
    rows = graph.reshape(x, (0, groups, channels // groups * prod(size)))
    ones, zeros = graph.constant([1.0] * groups), graph.constant([0.0] * groups)
    y = graph.add("InstanceNormalization", [rows, ones, zeros], epsilon=layer.eps)
    y = graph.reshape(y, (0, *layer.input_shape))
    return _affine(graph, layer, y, (channels, *(1 for _ in size)))


@emitter(LayerNorm)
def layer_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    axes = len(layer.normalized_shape)
    if graph.opset < 17:
        own = len(layer.input_shape) + 1
        y = _normalized(graph, x, list(range(own - axes, own)), layer.eps)
        return _affine(graph, layer, y, layer.normalized_shape)
    if "weight" in layer.params:
        scale = graph.weight(layer, "weight")
    else:
        scale = graph.constant([1.0] * prod(layer.normalized_shape), layer.normalized_shape)
    return graph.add(
        "LayerNormalization", [x, scale, *_bias(graph, layer)], axis=-axes, epsilon=layer.eps
    )


def _normalized(graph: GraphBuilder, x: str, axes: Sequence[int], eps: float) -> str:
    """Add (x - mean) / sqrt(var + eps), with mean and variance over ``axes``."""
    centred = graph.add("Sub", [x, graph.reduce("ReduceMean", x, axes)])
    var = graph.reduce("ReduceMean", graph.add("Mul", [centred, centred]), axes)
    std = graph.add("Sqrt", [graph.add("Add", [var, graph.constant(eps)])])
    return graph.add("Div", [centred, std])


def _affine(graph: GraphBuilder, layer: Any, y: str, shape: Sequence[int]) -> str:
    """Add y * weight + bias, if they exist; they broadcast as ``shape``."""
    for name, op_type in (("weight", "Mul"), ("bias", "Add")):
        if name in layer.params:
            value = graph.weight(layer, name)
            if tuple(layer.params[name].shape) != tuple(shape):
                value = graph.reshape(value, shape)
            y = graph.add(op_type, [y, value])
    return y


@emitter(LocalResponseNorm)
def local_response_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    """ONNX's operator for odd sizes, two spatial axes and positive values, as onnxruntime requires;
    else a formula.

    For even sizes ONNX's window lies one channel higher.
    """
    size, (channels, *spatial) = layer.size, layer.input_shape
    if size % 2 and len(spatial) == 2 and layer.alpha > 0 and layer.beta > 0:
        return graph.add("LRN", [x], size=size, alpha=layer.alpha, beta=layer.beta, bias=layer.k)
    squares = graph.reshape(graph.add("Mul", [x, x]), (0, 1, channels, prod(spatial)))
    pads = [size // 2, 0, (size - 1) // 2, 0]
    mean = graph.add(
        "AveragePool", [squares], kernel_shape=[size, 1], pads=pads, count_include_pad=1
    )
    mean = graph.reshape(mean, (0, channels, *spatial))
    u = graph.add(
        "Add", [graph.add("Mul", [mean, graph.constant(layer.alpha)]), graph.constant(layer.k)]
    )
    return graph.add("Div", [x, graph.add("Pow", [u, graph.constant(layer.beta)])])


# --- activations ----------------------------------------------------------------------------------


@emitter(ReLU)
def relu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Relu", [x])


@emitter(LeakyReLU)
def leaky_relu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("LeakyRelu", [x], alpha=float(layer.negative_slope))


@emitter(ELU)
def elu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Elu", [x], alpha=float(layer.alpha))


@emitter(Sigmoid)
def sigmoid(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Sigmoid", [x])


@emitter(Tanh)
def tanh(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Tanh", [x])


@emitter(SiLU)
def silu(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Mul", [x, graph.add("Sigmoid", [x])])


@emitter(GELU)
def gelu(graph: GraphBuilder, layer: Any, x: str) -> str:
    """An operator from opset 20 on; before that its formula."""
    if graph.opset >= 20:
        return graph.add("Gelu", [x], approximate=layer.approximate)
    if layer.approximate == "tanh":
        cube = graph.add("Mul", [graph.add("Mul", [x, x]), x])
        bent = graph.add("Add", [x, graph.add("Mul", [cube, graph.constant(0.044715)])])
        # sqrt(2 / pi)
        rising = graph.add("Tanh", [graph.add("Mul", [bent, graph.constant(0.7978845608028654)])])
    else:
        rising = graph.add("Erf", [graph.add("Div", [x, graph.constant(sqrt(2.0))])])
    below = graph.add("Mul", [graph.add("Add", [rising, graph.constant(1.0)]), graph.constant(0.5)])
    return graph.add("Mul", [x, below])


@emitter(Softplus)
def softplus(graph: GraphBuilder, layer: Any, x: str) -> str:
    """The threshold is written if it matters: above 20, float32 cannot distinguish log(1 + exp(z))
    from z."""
    if layer.beta == 1 and layer.threshold >= 20 and graph.dtype == "float32":
        return graph.add("Softplus", [x])
    beta = graph.constant(layer.beta)
    z = graph.add("Mul", [x, beta])
    y = graph.add("Div", [graph.add("Softplus", [z]), beta])
    return graph.add("Where", [graph.add("Greater", [z, graph.constant(layer.threshold)]), x, y])


@emitter(Softmax)
def softmax(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("Softmax", [x], axis=layer.dim)


@emitter(LogSoftmax)
def log_softmax(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("LogSoftmax", [x], axis=layer.dim)


@emitter(ScaledTanh)
def scaled_tanh(graph: GraphBuilder, layer: Any, x: str) -> str:
    y = graph.add("Tanh", [graph.add("Mul", [x, graph.constant(layer.slope)])])
    return graph.add("Mul", [y, graph.constant(layer.amplitude)])


# --- dropout: identity at inference ---------------------------------------------------------------


@emitter(Dropout)
def dropout(graph: GraphBuilder, layer: Any, x: str) -> str:
    """A node that runs as identity, and states the probability for tools that train the file."""
    return graph.add("Dropout", [x, graph.constant(layer.p)]) if 0 < layer.p < 1 else x


@emitter(Dropout1d, Dropout2d, Dropout3d)
def channel_dropout(graph: GraphBuilder, layer: Any, x: str) -> str:
    """ONNX has no dropout of whole channels."""
    return x
