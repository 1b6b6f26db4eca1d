"""Normalization."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.onnx.builder import GraphBuilder, bias_of, emitter
from portacnn.onnx.importer import (
    Importer,
    Known,
    Value,
    for_training,
    of_sample,
    operator,
    some,
    spatial_axes,
)
from portacnn.onnx.layers.join import repeated
from portacnn.onnx.reading import Operation, brief


@emitter(L.BatchNorm1d, L.BatchNorm2d, L.BatchNorm3d)
def write_batch_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write BatchNormalization. Without running statistics it is in training mode, and its mean and
    variance are constants: this is how ``read_batch_norm`` knows them apart."""
    if layer.track_running_stats:
        return _by_running_statistics(graph, layer, x)
    channels = layer.input_shape[0]
    unused = [graph.constant([value] * channels) for value in (0.0, 1.0)]
    mode = {"training_mode": 1} if graph.opset >= 14 else {}
    inputs = [x, *_scale_and_bias(graph, layer), *unused]
    y = graph.add("BatchNormalization", inputs, epsilon=layer.eps, **mode)
    # ONNX requires these outputs in training mode; before opset 14 they select it
    statistics = ("mean", "var") if mode else ("mean", "var", "saved_mean", "saved_var")
    graph.nodes[-1].output.extend(graph.fresh(name) for name in statistics)
    return y


@operator("BatchNormalization")
def read_batch_norm(at: Importer, op: Operation) -> Value:
    """Read training mode, which opsets 6, 7 to 13 and 14 write in three ways, as inference mode:
    the layer learns anyway. Its statistics are running ones, unless they are constants: then the
    file stores none."""
    x = at.value(op)
    weight, bias, mean, var = (at.weight(op, i) for i in range(1, 5))
    op.ignore("consumed_inputs")
    trains = for_training(at, op) or bool(op.whole("training_mode", 0))
    trains = trains or (at.opset < 14 and any(op.outputs[1:]))
    tracks = not trains or mean.learn or var.learn
    if trains and tracks:
        note = "BatchNormalization is in training mode; predictions use its running statistics"
        at.notes.setdefault(note, []).append(op.where)
    kinds = {2: L.BatchNorm1d, 3: L.BatchNorm1d, 4: L.BatchNorm2d, 5: L.BatchNorm3d}
    if x.rank not in kinds:
        raise op.wrong(f"expected samples (C,) to (C, D, H, W), got {brief(x.shape)}")
    flat, state = x, some(weight=weight, bias=bias)
    if tracks:
        state |= {"running_mean": mean, "running_var": var}
    if not op.whole("spatial", 1):  # before opset 9: statistics of each element
        flat = at.reshaped(op, x, (prod(x.shape),))
        state = {
            name: known._replace(array=known.array.reshape(-1)) for name, known in state.items()
        }
    if tracks:
        state["num_batches_tracked"] = Known(np.zeros((), np.int64))
    layer = kinds[flat.rank](
        flat.shape[0],
        op.real("epsilon", 1e-5),
        round(1.0 - op.real("momentum", 0.9), 7),
        track_running_stats=tracks,
    )
    return at.reshaped(op, at.add(op, layer, flat, **state), x.shape)


@emitter(L.InstanceNorm1d, L.InstanceNorm2d, L.InstanceNorm3d)
def write_instance_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    if layer.track_running_stats:
        return _by_running_statistics(graph, layer, x)
    return graph.add(
        "InstanceNormalization", [x, *_scale_and_bias(graph, layer)], epsilon=layer.eps
    )


@operator("InstanceNormalization")
def read_instance_norm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.weight(op, 2)
    op.ignore("consumed_inputs")
    axes = spatial_axes(at, op, x)
    if prod(x.shape[1:]) == 1:  # x - mean is 0
        column = bias._replace(array=bias.array.reshape(-1, *(1,) * axes))
        return repeated(at, op, column, x, learn=True)
    kind = (L.InstanceNorm1d, L.InstanceNorm2d, L.InstanceNorm3d)[axes - 1]
    return at.add(
        op, kind(x.shape[0], op.real("epsilon", 1e-5), affine=True), x, weight=weight, bias=bias
    )


def _by_running_statistics(graph: GraphBuilder, layer: Any, x: str) -> str:
    scale, bias = _scale_and_bias(graph, layer)
    mean, var = (graph.weight(layer, name) for name in ("running_mean", "running_var"))
    return graph.add(
        "BatchNormalization",
        [x, scale, bias, mean, var],
        epsilon=layer.eps,
        # ONNX's momentum is the weight of the old value
        momentum=None if layer.momentum is None else 1.0 - layer.momentum,
    )


def _scale_and_bias(graph: GraphBuilder, layer: Any) -> list[str]:
    """Return weight and bias of the channels; ones and zeros if there are none."""
    channels = layer.input_shape[0]
    if "weight" in layer.params:
        return [graph.weight(layer, "weight"), graph.weight(layer, "bias")]
    return [graph.constant([1.0] * channels), graph.constant([0.0] * channels)]


@emitter(L.GroupNorm)
def write_group_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write InstanceNormalization of the groups: GroupNormalization has this meaning from opset 21
    on only."""
    groups, (channels, *size) = layer.num_groups, layer.input_shape
    rows = graph.reshape(x, (0, groups, channels // groups * prod(size)))
    ones, zeros = graph.constant([1.0] * groups), graph.constant([0.0] * groups)
    y = graph.add("InstanceNormalization", [rows, ones, zeros], epsilon=layer.eps)
    y = graph.reshape(y, (0, *layer.input_shape))
    return _affine(graph, layer, y, (channels, *(1 for _ in size)))


@operator("GroupNormalization")
def read_group_norm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.weight(op, 2)
    op.ignore("stash_type")
    groups = op.whole("num_groups", 0)
    if not x.shape or groups < 1 or x.shape[0] % groups:
        raise op.wrong(
            f"num_groups={groups} do not divide the channels of samples {brief(x.shape)}"
        )
    if at.opset < 21:  # one number for each group
        each = x.shape[0] // groups
        if weight.array.shape != (groups,) or bias.array.shape != (groups,):
            raise op.wrong(f"scale and bias must be ({groups},)")
        at.source.budget.take(16 * x.shape[0])
        weight, bias = (k._replace(array=np.repeat(k.array, each)) for k in (weight, bias))
    layer = L.GroupNorm(groups, x.shape[0], op.real("epsilon", 1e-5))
    return at.add(op, layer, x, weight=weight, bias=bias)


@emitter(L.LayerNorm)
def write_layer_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
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
        "LayerNormalization", [x, scale, *bias_of(graph, layer)], axis=-axes, epsilon=layer.eps
    )


@operator("LayerNormalization")
def read_layer_norm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.optional_weight(op, 2)
    op.ignore("stash_type")
    axis = at.axis(op, op.whole("axis", -1), x.rank)
    shape, eps = x.shape[axis - 1 :], op.real("epsilon", 1e-5)
    if all(known.array.shape == shape for known in some(weight=weight, bias=bias).values()):
        layer = L.LayerNorm(shape, eps, True, bias is not None)
        return at.add(op, layer, x, weight=weight, **some(bias=bias))
    # they broadcast to x in another way
    y = at.add(op, L.LayerNorm(shape, eps, elementwise_affine=False), x)
    for kind, known in (("multiply", weight), ("add", bias)):
        if known is not None:
            array = of_sample(op, known.array, x)
            with_ = L.ArithmeticWith(kind, array.shape, learn=known.learn)
            y = at.add(op, with_, y, value=known._replace(array=array))
    if y.shape != x.shape:
        raise op.wrong(f"its scale and bias do not broadcast to samples {brief(x.shape)}")
    return y


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


@emitter(L.LocalResponseNorm)
def write_local_response_norm(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write LRN if onnxruntime supports it (odd size, two spatial axes, positive numbers);
    otherwise write its formula.

    For even sizes, ONNX's window is shifted by one channel.
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


@operator("LRN")
def read_lrn(at: Importer, op: Operation) -> Value:
    size = op.whole("size", 0)
    if size % 2 == 0:
        raise op.wrong(f"size={size} is not odd; only odd ones are supported")
    layer = L.LocalResponseNorm(
        size, op.real("alpha", 1e-4), op.real("beta", 0.75), op.real("bias", 1.0)
    )
    return at.add(op, layer, at.value(op))
