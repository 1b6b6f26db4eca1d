"""Networks as ONNX files: what onnxruntime makes of them is what the network gives; and files that
are whole or not there."""

import re
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import portacnn.onnx
from portacnn import layers as L
from portacnn import models as M
from portacnn.errors import ArgumentError, DependencyError, ModelFormatError, ShapeError, StateError
from portacnn.layers import Conv2d, Flatten, Layer, Linear, ReLU, Residual, Sequential
from portacnn.models.lenet5 import ScaledTanh, TableConv2d
from portacnn.models.resnet import PadChannels
from portacnn.onnx import export as public_export
from portacnn.runtime import backend_of
from support.checks import refuses

onnx = pytest.importorskip("onnx", reason='onnx is not installed: pip install "portacnn[onnx]"')
runtime = pytest.importorskip(
    "onnxruntime", reason="onnxruntime is not installed: pip install onnxruntime"
)
reference = pytest.importorskip(
    "onnx.reference", reason="onnx came without its reference evaluator"
)

exporting, building = sys.modules["portacnn.onnx.export"], sys.modules["portacnn.onnx.builder"]
NEWEST = min(exporting.NEWEST, onnx.defs.onnx_opset_version())
# Where something is written differently from one version to the next, and both ends.
OPSETS = sorted({13, 17, 18, 20, NEWEST})

# Every layer in all its forms: class, arguments, the shape of one sample.
CASES = [
    (L.Conv1d, (3, 4, 3), {"padding": 1, "stride": 2}, (3, 9)),
    (L.Conv1d, (2, 2, 4), {"padding": "same", "dilation": 2}, (2, 8)),
    (L.Conv1d, (2, 2, 4), {"padding": [(2, 3)], "padding_mode": "reflect"}, (2, 8)),
    (L.Conv2d, (2, 4, 3), {}, (2, 5, 6)),
    (L.Conv2d, (None, 3, (3, 2)), {"stride": (2, 1), "padding": (1, 0), "bias": False}, (2, 5, 4)),
    (L.Conv2d, (4, 6, 3), {"groups": 2, "dilation": 2}, (4, 6, 5)),
    (L.Conv2d, (4, 8, 3), {"groups": 4, "padding": [(2, 0), (0, 3)]}, (4, 6, 5)),
    (L.Conv2d, (2, 2, 4), {"padding": "same", "stride": 2}, (2, 7, 6)),
    (L.Conv2d, (2, 2, 3), {"padding": "valid"}, (2, 7, 6)),
    (L.Conv2d, (2, 3, 3), {"padding": [(2, 1), (0, 2)], "padding_mode": "circular"}, (2, 5, 4)),
    (L.Conv2d, (2, 3, 3), {"padding": (1, 2), "padding_mode": "replicate"}, (2, 5, 4)),
    (L.Conv2d, (2, 3, 3), {"padding": "same", "padding_mode": "reflect"}, (2, 5, 4)),
    (L.Conv3d, (2, 3, 2), {"stride": (1, 2, 1), "padding": (1, 0, 1)}, (2, 4, 5, 3)),
    (L.Conv3d, (2, 3, 3), {"padding": 1, "padding_mode": "circular"}, (2, 4, 5, 3)),
    (L.ConvTranspose1d, (3, 4, 3), {"stride": 2, "padding": 1, "output_padding": 1}, (3, 5)),
    (L.ConvTranspose2d, (4, 6, 3), {"stride": 2, "groups": 2, "bias": False}, (4, 5, 4)),
    (L.ConvTranspose2d, (2, 3, (3, 2)), {"dilation": 2, "padding": [(1, 0), (0, 2)]}, (2, 4, 5)),
    (L.ConvTranspose2d, (2, 3, 3), {"dilation": 3, "output_padding": 2}, (2, 4, 5)),
    (
        L.ConvTranspose2d,
        (2, 3, 3),
        {"dilation": 3, "output_padding": (2, 1), "padding": (1, 3), "bias": False},
        (2, 4, 5),
    ),
    (L.ConvTranspose3d, (2, 2, 2), {"stride": 2}, (2, 3, 2, 3)),
    (L.Linear, (5, 3), {}, (5,)),
    (L.Linear, (None, 3), {"bias": False}, (5,)),
    (L.Flatten, (), {}, (2, 3, 4)),
    (L.Flatten, (), {}, (5,)),
    (L.MaxPool1d, (3,), {"stride": 2, "padding": 1}, (2, 8)),
    (L.MaxPool2d, (2,), {}, (2, 5, 4)),
    (L.MaxPool2d, (3, 2, 1), {"ceil_mode": True}, (2, 6, 6)),
    (L.MaxPool2d, ((2, 3), (3, 2)), {"ceil_mode": True}, (2, 6, 6)),
    (L.MaxPool2d, (2, 3), {"ceil_mode": True, "padding": 1}, (2, 4, 5)),
    (L.MaxPool2d, (2, 5), {}, (2, 8, 9)),
    (L.MaxPool2d, (2, 1), {"dilation": 2}, (1, 5, 4)),
    (L.MaxPool2d, (3, 1), {"dilation": 3, "padding": 3}, (2, 5, 6)),
    (L.MaxPool2d, (3, 2), {"padding": [(0, 1), (2, 0)]}, (2, 5, 6)),
    (L.MaxPool2d, (3, 2), {"padding": "same"}, (2, 6, 5)),
    (L.MaxPool3d, (2,), {"stride": 1, "ceil_mode": True}, (2, 3, 4, 3)),
    (L.AvgPool1d, (3,), {"stride": 2, "padding": 1}, (2, 8)),
    (L.AvgPool2d, (2,), {}, (2, 5, 4)),
    (L.AvgPool2d, (1, 2), {}, (2, 5, 4)),
    (L.AvgPool2d, (3, 2, 1), {"count_include_pad": False}, (2, 5, 6)),
    (L.AvgPool2d, (3, 2, 1), {"ceil_mode": True}, (2, 6, 6)),
    (L.AvgPool2d, (3, 2, 1), {"ceil_mode": True, "count_include_pad": False}, (2, 6, 6)),
    (L.AvgPool2d, ((2, 3), (3, 2)), {"ceil_mode": True, "divisor_override": 5}, (2, 6, 6)),
    (L.AvgPool2d, (3, 2), {"padding": [(0, 1), (2, 0)]}, (2, 5, 6)),
    (L.AvgPool2d, (3, 2), {"padding": "same"}, (2, 6, 5)),
    (L.AvgPool3d, (2,), {"stride": (1, 2, 3), "padding": 1, "ceil_mode": True}, (2, 3, 4, 4)),
    (L.AdaptiveAvgPool1d, (3,), {}, (2, 7)),
    (L.AdaptiveAvgPool2d, (1,), {}, (2, 5, 4)),
    (L.AdaptiveAvgPool2d, ((2, 3),), {}, (2, 4, 6)),
    (L.AdaptiveAvgPool2d, ((3, None),), {}, (2, 7, 4)),
    (L.AdaptiveAvgPool2d, (7,), {}, (2, 2, 5)),
    (L.AdaptiveAvgPool2d, (4,), {}, (2, 4, 4)),
    (L.AdaptiveAvgPool3d, ((2, 3, 2),), {}, (2, 5, 4, 3)),
    (L.AdaptiveMaxPool1d, (3,), {}, (2, 7)),
    (L.AdaptiveMaxPool2d, (1,), {}, (2, 5, 4)),
    (L.AdaptiveMaxPool2d, ((2, 3),), {}, (2, 4, 6)),
    (L.AdaptiveMaxPool2d, ((3, 4),), {}, (2, 7, 5)),
    (L.AdaptiveMaxPool3d, ((2, 3, 2),), {}, (2, 5, 4, 3)),
    (L.GlobalAvgPool, (), {}, (2, 5)),
    (L.GlobalAvgPool, (), {"flatten": True}, (2, 5, 4)),
    (L.GlobalAvgPool, (), {}, (2, 3, 2, 3, 2)),
    (L.GlobalMaxPool, (), {"flatten": True}, (2, 5)),
    (L.GlobalMaxPool, (), {}, (2, 5, 4, 3)),
    (L.GlobalMaxPool, (), {"flatten": True}, (2, 3, 2, 3, 2)),
    (L.BatchNorm1d, (4,), {}, (4,)),
    (L.BatchNorm1d, (4,), {"momentum": None}, (4, 5)),
    (L.BatchNorm1d, (4,), {"track_running_stats": False}, (4, 5)),
    (L.BatchNorm2d, (3,), {"affine": False}, (3, 4, 5)),
    (L.BatchNorm2d, (None,), {"eps": 0.1}, (3, 4, 5)),
    (L.BatchNorm2d, (3,), {"track_running_stats": False}, (3, 4, 5)),
    (L.BatchNorm3d, (3,), {}, (3, 2, 4, 5)),
    (L.InstanceNorm1d, (3,), {}, (3, 9)),
    (L.InstanceNorm2d, (3,), {"affine": True}, (3, 4, 5)),
    (L.InstanceNorm2d, (3,), {"track_running_stats": True}, (3, 4, 5)),
    (L.InstanceNorm3d, (None,), {"affine": True, "track_running_stats": True}, (3, 2, 4, 5)),
    (L.GroupNorm, (2, 4), {}, (4,)),
    (L.GroupNorm, (3, 6), {"eps": 0.01}, (6, 4, 5)),
    (L.GroupNorm, (2, None), {"affine": False}, (4, 7)),
    (L.LayerNorm, (6,), {}, (6,)),
    (L.LayerNorm, ((4, 5),), {}, (3, 4, 5)),
    (L.LayerNorm, ((3, 4, 5),), {"bias": False}, (3, 4, 5)),
    (L.LayerNorm, (5,), {"elementwise_affine": False}, (3, 4, 5)),
    (L.LocalResponseNorm, (5,), {"alpha": 0.5, "k": 2.0}, (7, 3, 4)),
    (L.LocalResponseNorm, (5,), {"alpha": 0.5}, (3, 3, 4)),
    (L.LocalResponseNorm, (4,), {"alpha": 0.5, "beta": 0.6}, (7, 3, 4)),
    (L.LocalResponseNorm, (2,), {"alpha": 0.5}, (5, 6)),
    (L.LocalResponseNorm, (3,), {"alpha": 0.5, "beta": -0.5}, (5, 3, 4)),
    (L.LocalResponseNorm, (3,), {"alpha": 0.5}, (5, 2, 3, 4)),
    (L.ReLU, (), {}, (2, 3, 4)),
    (L.LeakyReLU, (), {}, (2, 3, 4)),
    (L.LeakyReLU, (-0.3,), {}, (7,)),
    (L.ELU, (), {}, (2, 3, 4)),
    (L.ELU, (2,), {}, (2, 3, 4)),
    (L.Sigmoid, (), {}, (6,)),
    (L.Tanh, (), {}, (6,)),
    (L.SiLU, (), {}, (2, 3, 4)),
    (L.GELU, (), {}, (2, 3, 4)),
    (L.GELU, ("tanh",), {}, (2, 3, 4)),
    (L.Softplus, (), {}, (2, 3, 4)),
    (L.Softplus, (2.0, 1.0), {}, (2, 3, 4)),
    (L.Softplus, (1, 0.5), {}, (2, 3, 4)),
    (L.SELU, (), {}, (2, 3, 4)),
    (L.SELU, (1.2, 0.7), {}, (2, 3, 4)),
    (L.CELU, (0.6,), {}, (2, 3, 4)),
    (L.CELU, (-1.5,), {}, (2, 3, 4)),
    (L.HardSigmoid, (), {}, (2, 3, 4)),
    (L.HardSigmoid, (0.2, 0.4), {}, (2, 3, 4)),
    (L.HardSwish, (), {}, (2, 3, 4)),
    (L.Clip, (-0.5, 0.5), {}, (2, 3, 4)),
    (L.Clip, (), {"max": 0.5}, (2, 3, 4)),
    (L.Clip, (0,), {}, (2, 3, 4)),
    (L.PReLU, (), {}, (2, 3, 4)),
    (L.PReLU, ((2, 1, 1),), {}, (2, 3, 4)),
    *(
        (L.Elementwise, (function,), {}, (2, 3, 4))
        for function in (
            "abs",
            "cos",
            "erf",
            "exp",
            "mish",
            "negative",
            "reciprocal",
            "sin",
            "softsign",
        )
    ),
    (L.Reshape, ((4, 6),), {}, (2, 3, 4)),
    (L.Permute, ((0, 3, 1, 2),), {}, (2, 3, 4)),
    (L.Pad, (((0, 1), (2, 0), (1, 1)),), {"value": 2.5}, (2, 3, 4)),
    (L.Pad, (((0, 0), (2, 1), (0, 3)), "reflect"), {}, (2, 3, 4)),
    (L.Slice, ((0, 1, 0), (2, 3, 4), (1, 1, 2)), {}, (2, 3, 4)),
    (L.Take, ([2, 0, 0], 3), {}, (2, 3, 4)),
    (L.Crop, ([(1, 0), (0, 2)],), {}, (2, 3, 4)),
    (L.CenterCrop, ((2, 3),), {}, (2, 5, 4)),
    (L.Upsample, (None, 2), {}, (2, 3, 4)),
    (L.Upsample, (None, (0.5, 1.7)), {}, (2, 5, 7)),
    (L.Upsample, ((7, 3),), {}, (2, 3, 5)),
    (L.Upsample, (None, 2.0), {"mode": "linear"}, (2, 3)),
    (L.Upsample, (None, (1.3, 2)), {"mode": "bilinear"}, (2, 4, 3)),
    (L.Upsample, ((7, 3),), {"mode": "bilinear"}, (2, 3, 5)),
    (L.Upsample, (None, 2), {"mode": "bilinear", "align_corners": True}, (2, 3, 4)),
    (L.Upsample, (None, 0.5), {"mode": "bilinear", "align_corners": True}, (2, 5, 4)),
    (L.Upsample, ((2, 5, 3),), {"mode": "trilinear", "align_corners": True}, (1, 3, 2, 3)),
    (L.PixelShuffle, (2,), {}, (12, 2, 3)),
    (L.PixelUnshuffle, (3,), {}, (2, 6, 3)),
    (L.SqueezeExcitation, (4, 2), {}, (4, 3, 2)),
    (L.StochasticDepth, (0.3,), {}, (2, 3)),
    (L.Reduce, ("mean", (1, 3)), {}, (2, 3, 4)),
    (L.Reduce, ("sum", (2,)), {"keepdims": True}, (2, 3, 4)),
    (L.MatMulWith, (5,), {}, (2, 3, 4)),
    *(
        (L.ArithmeticWith, (kind, (2, 1, 1)), {"constant_first": first}, (2, 3, 4))
        for kind in ("add", "subtract", "multiply", "divide", "maximum", "minimum")
        for first in (False, True)
    ),
    (L.ArithmeticWith, ("add", ()), {"learn": False}, (2, 3, 4)),
    (L.Softmax, (1,), {}, (4, 3, 2)),
    (L.Softmax, (-1,), {}, (4, 3, 2)),
    (L.Softmax, (0,), {}, (4,)),
    (L.LogSoftmax, (1,), {}, (5,)),
    (L.LogSoftmax, (2,), {}, (4, 3, 2)),
    (L.Dropout, (), {}, (2, 3)),
    (L.Dropout, (0.0,), {}, (2, 3)),
    (L.Dropout, (1.0,), {}, (2, 3)),
    (L.Dropout1d, (), {}, (2, 3)),
    (L.Dropout2d, (), {}, (2, 3, 4)),
    (L.Dropout3d, (), {}, (2, 3, 4, 2)),
    (ScaledTanh, (), {}, (2, 3)),
    (TableConv2d, ([[0], [0, 2], [1, 2, 3]], (3, 2)), {}, (4, 5, 4)),
    (PadChannels, (5,), {}, (2, 3, 4)),
    (PadChannels, (2,), {}, (2, 3)),
]

# Containers, by functions that make them: no layer may be in two networks.
NESTED = {
    "Sequential": (lambda: Sequential(), (3, 4)),
    "Sequential of stages that are run as one": (
        lambda: Sequential(
            conv=L.Conv2d(2, 4, 3, padding=1),
            relu=ReLU(),
            pool=L.MaxPool2d(2),
            conv2=Conv2d(4, 3, 1),
            bn=L.BatchNorm2d(3),
            act=ReLU(),
            inner=Sequential(Flatten(), Linear(None, 5), ReLU(), L.Dropout(0.3)),
        ),
        (2, 6, 7),
    ),
    "Residual": (lambda: Residual(Conv2d(3, 3, 3, padding=1)), (3, 4, 5)),
    "Residual with a shortcut": (
        lambda: Sequential(
            block=Residual(
                Sequential(
                    conv1=Conv2d(2, 4, 3, 2, 1),
                    bn1=L.BatchNorm2d(4),
                    relu=ReLU(),
                    conv2=Conv2d(4, 4, 1),
                ),
                Sequential(Conv2d(2, 4, 1, 2), L.BatchNorm2d(4)),
                activation=ReLU(),
            )
        ),
        (2, 6, 6),
    ),
    "Branches": (
        lambda: L.Branches(
            Conv2d(3, 2, 1),
            Sequential(),
            side=Sequential(L.MaxPool2d(3, 1, 1), Conv2d(3, 4, 1)),
            join="concat",
        ),
        (3, 4, 5),
    ),
    "Branches that are added": (
        lambda: L.Branches(
            Linear(5, 4), Linear(5, 4), Sequential(Linear(5, 4), L.Tanh()), join="add"
        ),
        (5,),
    ),
    "Recompute": (
        lambda: Sequential(L.Recompute(Sequential(Linear(5, 4), ReLU())), Linear(4, 2)),
        (5,),
    ),
    "Branches of one": (lambda: L.Branches(Linear(5, 4)), (5,)),
    "Graph": (
        lambda: L.Graph(
            ("a", Conv2d(3, 4, 3, padding=1), ["input"]),
            ("b.c", L.Sigmoid(), ["a"]),
            ("d", L.Concat(), ["a", "b.c"]),
            ("e", L.Permute((0, 1, 3, 2)), ["d"]),
            ("f", L.MatMul(), ["d", "e"]),
            *(
                (kind, L.Arithmetic(kind), ["f", last])
                for kind, last in [("add", "f"), ("maximum", "add")]
            ),
            ("minimum", L.Arithmetic("minimum"), ["maximum", "f"]),
            ("g", L.Reduce("mean", (2, 3), keepdims=True), ["minimum"]),
            ("multiply", L.Arithmetic("multiply"), ["f", "g"]),
            ("h", Sequential(L.Sigmoid(), L.ArithmeticWith("power", ())), ["g"]),
            ("divide", L.Arithmetic("divide"), ["multiply", "h"]),
            ("power", L.Arithmetic("power"), ["h", "h"]),
            ("subtract", L.Arithmetic("subtract"), ["divide", "power"]),
        ),
        (3, 4, 5),
    ),
    "GraphModel": (
        lambda: M.GraphModel(
            ("a", Conv2d(4, 4, 1), ["input"]), ("b", L.Arithmetic("add"), ["a", "input"])
        ),
        (4, 5, 5),
    ),
    "Model": (lambda: M.Model(Flatten(), Linear(None, 3)), (2, 3)),
}

MODELS = {
    "SimpleConvNet": lambda **given: M.SimpleConvNet(weight_init_std="he", **given),
    "LeNet5": lambda **given: M.LeNet5(**given),
    "LeNet5 modern": lambda **given: M.LeNet5(variant="modern", **given),
    "DeepConvNet": lambda **given: M.DeepConvNet(**given),
    "ResNet20": lambda **given: M.ResNet20(**given),
    "ResNet20 B": lambda **given: M.ResNet20(option="B", **given),
    "UNet": lambda **given: M.UNet(1, 2, depth=2, width=4, input_size=12, **given),
    "UNet bilinear": lambda **given: M.UNet(
        1, 2, depth=2, width=4, up="bilinear", input_size=12, **given
    ),
}
BIG = {
    "AlexNet": lambda **given: M.AlexNet(hidden_size=256, **given),
    "VGG11": lambda **given: M.VGG11(input_size=96, hidden_size=64, batch_norm=True, **given),
    "VGG11 as published": lambda **given: M.VGG11(**given),
    "VGG16": lambda **given: M.VGG16(input_size=32, hidden_size=64, **given),
    "ResNet18": lambda **given: M.ResNet18(input_size=96, **given),
    "ResNet50": lambda **given: M.ResNet50(input_size=96, **given),
    "MobileNetV2": lambda **given: M.MobileNetV2(input_size=64, **given),
    "EfficientNetB0": lambda **given: M.EfficientNetB0(input_size=64, **given),
}

# What only others derive from: it cannot be run by itself.
BASES = {"ResNet", "VGG"}


def filled(network, seed=0):
    """The network with numbers in all its parameters and buffers that are neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    state = {}
    for name, array in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.asarray(7)
        elif name.endswith("running_var"):
            state[name] = rng.uniform(0.5, 2.0, array.shape)
        else:
            state[name] = rng.standard_normal(array.shape) / np.sqrt(
                max(np.prod(array.shape[1:]), 1)
            )
    network.load_state_dict(state)
    return network


def images(network, count, dtype="float32", seed=1):
    return (2 * np.random.default_rng(seed).standard_normal((count, *network.input_shape))).astype(
        dtype
    )


def run(path, x):
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"input": x})
    return y


def export(network, folder, **options):
    """Export to a file that passes onnx's own full check; gives its path."""
    path = folder / "model.onnx"
    public_export(network, path, **options)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def nodes(path):
    return list(onnx.load(path, load_external_data=False).graph.node)


def close(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    np.testing.assert_allclose(
        got, expected, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(expected).max(initial=0.0))
    )


def agrees(network, folder, opsets=(18,)):
    """onnxruntime gives what the network gives, for batches of 1 and 7 by one file."""
    for opset in opsets:
        path = export(network, folder, opset=opset)
        for count in (1, 7):
            x = images(network, count)
            close(run(path, x), network(x))


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "shape"),
    CASES,
    ids=[f"{case[0].__name__}-{i}" for i, case in enumerate(CASES)],
)
def test_every_layer(kind, args, kwargs, shape, tmp_path):
    agrees(filled(kind(*args, **kwargs).build(shape, device="numpy", seed=0)), tmp_path, OPSETS)


@pytest.mark.parametrize("name", NESTED)
def test_every_container(name, tmp_path):
    make, shape = NESTED[name]
    agrees(filled(make().build(shape, device="numpy", seed=0)), tmp_path, OPSETS)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (L.AvgPool2d(2, 1, dilation=2), (2, 6, 5)),
        (L.AvgPool2d(3, 2, 1, ceil_mode=True, dilation=2), (2, 8, 8)),
        (L.AvgPool2d(3, 2, 1, count_include_pad=False, dilation=2), (2, 8, 8)),
        (L.Pad(((0, 0), (2, 1), (0, 3)), "circular"), (2, 3, 4)),
    ],
    ids=repr,
)
def test_what_asks_for_a_newer_opset(layer, shape, tmp_path):
    agrees(layer.build(shape, device="numpy", seed=0), tmp_path, (19, NEWEST))
    with pytest.raises(ArgumentError, match="opset 19"):
        public_export(layer, tmp_path / "model.onnx", opset=18)


@pytest.mark.parametrize("name", MODELS)
def test_models(name, tmp_path):
    agrees(MODELS[name](device="numpy", seed=0), tmp_path, (18, NEWEST))


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_big_models(name, tmp_path):
    agrees(BIG[name](device="numpy", seed=0), tmp_path)


WINDOWS = (
    L.Conv2d,
    L.ConvTranspose2d,
    L.MaxPool2d,
    L.AvgPool2d,
    L.AdaptiveAvgPool2d,
    L.AdaptiveMaxPool2d,
)


@settings(
    max_examples=200, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(kind=st.sampled_from(WINDOWS), data=st.data())
def test_drawn_geometries(kind, data, tmp_path):
    def pair(least, most):
        return data.draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    size, geometry = pair(3, 9), {"stride": pair(1, 4)}
    if kind in (L.AdaptiveAvgPool2d, L.AdaptiveMaxPool2d):
        layer = kind(pair(1, 9))
    else:
        kernel = pair(1, 4)
        if kind is not L.AvgPool2d:
            geometry["dilation"] = pair(1, 3)
        if kind in (L.MaxPool2d, L.AvgPool2d):
            geometry["ceil_mode"] = data.draw(st.booleans())
            args = (kernel,)
        else:
            geometry["groups"] = data.draw(st.sampled_from([1, 2]))
            args = (4, 6, kernel)
        if kind is L.ConvTranspose2d:
            geometry["output_padding"] = pair(0, 3)
        if kind is L.AvgPool2d:
            geometry["count_include_pad"] = data.draw(st.booleans())
        geometry["padding"] = data.draw(st.sampled_from([pair(0, 2), [pair(0, 3), pair(0, 3)]]))
        try:
            layer = kind(*args, **geometry)
        except ArgumentError:
            assume(False)
    try:
        layer.build((4, *size), device="numpy", seed=0)
    except (ArgumentError, ShapeError):
        assume(False)
    agrees(layer, tmp_path, (data.draw(st.sampled_from(OPSETS)),))


def test_no_class_is_forgotten():
    tested = {case[0] for case in CASES} | {
        Sequential,
        Residual,
        L.Branches,
        L.Recompute,
        M.Model,
        L.Graph,
        M.GraphModel,
    }
    tested |= {L.Arithmetic, L.Concat, L.MatMul}  # in the graph
    tested |= {getattr(M, name.split()[0]) for name in [*MODELS, *BIG]}
    own = {kind for kind in Layer.known.values() if kind.__module__.partition(".")[0] == "portacnn"}
    assert {kind.__name__ for kind in own} == {kind.__name__ for kind in tested} | BASES


# --- names and shapes -----------------------------------------------------------------------------


def test_names_are_paths(tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    file = onnx.load(export(model, tmp_path))
    state = {
        name: array
        for name, array in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    assert list(found) == list(state)
    assert all(np.array_equal(found[name], state[name]) for name in state)
    names = [node.name for node in file.graph.node]
    assert names[:3] == ["conv1/Conv", "bn1/BatchNormalization", "relu/Relu"]
    assert {"layer2.0.conv1/Conv", "layer2.0/Add", "layer2.0.activation/Relu", "fc/Gemm"} <= set(
        names
    )
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("dynamic", "batch"), [(True, "N"), (False, 1)])
def test_input_and_output(dynamic, batch, tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    file = onnx.load(export(model, tmp_path, dynamic_batch=dynamic))
    given, made = (
        (
            value.name,
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in (*file.graph.input, *file.graph.output)
    )
    assert given == ("input", [batch, 1, 28, 28])
    assert made == ("output", [batch, 10])
    x = images(model, 1)
    close(run(tmp_path / "model.onnx", x), model.predict(x))


def test_names_like_those_of_the_input_and_output(tmp_path):
    network = Sequential(
        input=Linear(4, 4), output=Sequential(input=Linear(4, 3), **{"input/Gemm": ReLU()})
    )
    agrees(filled(network.build((4,), device="numpy", seed=0)), tmp_path)


def test_parameters_and_nodes_whose_names_are_near_each_other(tmp_path):
    network = Residual(Linear(4, 4, bias=False), Linear(4, 4), shortcut_name="Gemm")
    agrees(filled(network.build((4,), device="numpy", seed=0)), tmp_path)


def test_a_part_of_a_network(tmp_path):
    model = M.VGG11(input_size=32, hidden_size=8, device="numpy", seed=0)
    part = model.children["classifier"]
    path = export(part, tmp_path)
    assert nodes(path)[0].name == "0/Gemm"
    assert part.path == "classifier"
    x = images(part, 3)
    close(run(path, x), part(x))


def test_the_network_stays_as_it_was(tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    before, rows = model.state_dict(), [(layer.path, layer.input_shape) for layer in model.walk()]
    export(model, tmp_path, input_shape=(3, 40, 24))
    assert [(layer.path, layer.input_shape) for layer in model.walk()] == rows
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())


def test_from_every_backend(backend, tmp_path):
    model = M.SimpleConvNet(device=backend.device, seed=0)
    x = images(model, 3)
    path = export(model, tmp_path)
    close(run(path, x), backend.host(model.predict(backend.array(x))))


# --- other samples, opsets, dtypes ----------------------------------------------------------------


def test_other_samples_than_it_was_built_for(tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    path = export(model, tmp_path, input_shape=(3, 48, 40))
    x = np.random.default_rng(0).standard_normal((2, 3, 48, 40)).astype("float32")
    close(run(path, x), model(x))


def test_other_samples_that_the_weights_do_not_fit(tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    words = ("fc1 (Linear)", "weight must have shape (100, 5880)", "has (100, 4320)")
    refuses(
        ShapeError,
        *words,
        call=lambda: public_export(model, tmp_path / "m.onnx", input_shape=(1, 32, 32)),
    )
    refuses(
        ShapeError,
        "conv1 (Conv2d)",
        "(30, 3, 5, 5)",
        call=lambda: public_export(model, tmp_path / "m.onnx", input_shape=(3, 28, 28)),
    )
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_not_built(tmp_path):
    network = Sequential(Conv2d(None, 2, 3), Flatten(), Linear(None, 4))
    refuses(
        StateError,
        "not built",
        "input_shape",
        call=lambda: public_export(network, tmp_path / "m.onnx"),
    )
    path = export(network, tmp_path, input_shape=(3, 5, 6))
    x = images(network, 2)
    close(run(path, x), network(x))


@pytest.mark.parametrize("opset", [12, NEWEST + 1, 17.0, True, "18"])
def test_opsets_that_are_refused(opset, tmp_path):
    words = (str(13), str(NEWEST)) if type(opset) is int else ("opset", repr(opset))
    network = Linear(3, 2).build((3,), device="numpy")
    refuses(
        ArgumentError, *words, call=lambda: public_export(network, tmp_path / "m.onnx", opset=opset)
    )


@pytest.mark.parametrize("opset", OPSETS)
def test_the_file_names_its_opset(opset, tmp_path):
    network = Sequential(
        L.GELU(), L.LayerNorm(4), Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    )
    path = export(network.build((2, 3, 4), device="numpy"), tmp_path, opset=opset)
    assert onnx.load(path).opset_import[0].version == opset
    used = {node.op_type for node in nodes(path)}
    assert ("Gelu" in used) == (opset >= 20)
    assert ("LayerNormalization" in used) == (opset >= 17)
    assert ("Pad" in used) == (opset >= 19)  # which had no "wrap" before


@pytest.mark.parametrize("name", ["SimpleConvNet", "LeNet5", "ResNet20"])
def test_float64(name, tmp_path):
    """onnx's reference evaluator runs it: onnxruntime has no float64 for some operators."""
    model = MODELS[name](device="numpy", seed=0, dtype="float64")
    path = export(model, tmp_path)
    x = images(model, 2, "float64")
    (y,) = reference.ReferenceEvaluator(str(path)).run(None, {"input": x})
    assert y.dtype == np.float64
    np.testing.assert_allclose(
        y, model.predict(x), rtol=1e-6, atol=1e-6 * np.abs(y).max()
    )  # epsilon is a float32 there


def test_dtype_of_the_file(tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0, dtype="float64")
    path = export(model, tmp_path, dtype="float32")
    x = images(model, 3)
    close(run(path, x), model.predict(x).astype("float32"))


@pytest.mark.parametrize(("dtype", "code"), [("float16", 10), ("bfloat16", 16)])
def test_weights_in_half_the_bytes(dtype, code, tmp_path):
    torch = pytest.importorskip(
        "torch", reason="PyTorch, which rounds the weights, is not installed"
    )
    model = filled(M.ResNet20(device="numpy", seed=0))
    whole = export(model, tmp_path).stat().st_size
    path = export(model, tmp_path, dtype=dtype)
    assert path.stat().st_size < 0.55 * whole
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    assert kinds["layer1.0.conv1.weight"] == code
    assert kinds["bn1.running_var"] == kinds["fc.bias"] == 1
    x = images(model, 7)
    exact = model.predict(x)
    rounded = {
        name: torch.tensor(array).to(getattr(torch, dtype)).float().numpy()
        if array.ndim > 1
        else array
        for name, array in model.state_dict().items()
    }
    model.load_state_dict(rounded)
    got = run(path, x)
    close(got, model.predict(x))
    assert not np.allclose(got, exact, rtol=1e-5, atol=1e-5)


def test_bfloat16_of_odd_numbers(tmp_path):
    torch = pytest.importorskip(
        "torch", reason="PyTorch, which rounds the weights, is not installed"
    )
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype="uint64").astype("uint32")
    values = np.concatenate(
        [bits.view("float32"), np.float32([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.3e38])]
    )
    values = np.concatenate(
        [values, np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x3F808000, 0x3F818000]).view("float32")]
    )
    values = values[np.isnan(values) | np.isinf(values) | (np.abs(values) < 3.3e38)]
    network = Linear(len(values), 1, bias=False).build((len(values),), device="numpy")
    network.load_state_dict({"weight": values[None]})
    (tensor,) = onnx.load(export(network, tmp_path, dtype="bfloat16")).graph.initializer
    got = (
        torch.tensor(np.frombuffer(tensor.raw_data, "<i2").copy())
        .view(torch.bfloat16)
        .float()
        .numpy()
    )
    np.testing.assert_array_equal(got, torch.tensor(values).to(torch.bfloat16).float().numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_that_are_infinite_stay_so(dtype, tmp_path):
    network = Linear(2, 1, bias=False).build((2,), device="numpy")
    network.load_state_dict({"weight": np.array([[np.inf, 1.0]])})
    assert run(export(network, tmp_path, dtype=dtype), np.ones((1, 2), "float32")) == np.inf


def test_weights_too_large_for_their_dtype(tmp_path):
    network = Sequential(fc=Linear(2, 1)).build((2,), device="numpy", dtype="float64")
    network.load_state_dict({"fc.weight": np.array([[7e4, -1e39]]), "fc.bias": np.zeros(1)})
    for dtype in ("float16", "float32", "bfloat16"):
        words = ("fc (Linear)", "fc.weight", "1e+39", dtype)
        refuses(
            ArgumentError,
            *words,
            call=lambda dtype=dtype: public_export(network, tmp_path / "m", dtype=dtype),
        )
    refuses(
        ArgumentError,
        "dtype",
        "int8",
        call=lambda: public_export(network, tmp_path / "m", dtype="int8"),
    )
    assert not list(tmp_path.iterdir())


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "normalize",
    [
        M.Normalize(),
        M.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        M.Normalize(1.0, 3.0, 2.0),
    ],
    ids=["scale", "torchvision", "numbers"],
)
def test_preprocess(normalize, tmp_path):
    model = M.ResNet20(device="numpy", seed=0)
    model.preprocess = normalize
    path = export(model, tmp_path, preprocess=True)
    for count in (1, 7):
        x = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32), dtype="uint8")
        close(run(path, x), model.predict(x))
    x = images(model, 2)
    close(run(export(model, tmp_path), x), model.predict(x))  # left out where it is not asked for


def test_preprocess_that_is_not_there(tmp_path):
    for network in (
        M.SimpleConvNet(device="numpy", seed=0),
        Linear(3, 2).build((3,), device="numpy"),
    ):
        call = lambda network=network: public_export(network, tmp_path / "m.onnx", preprocess=True)  # noqa: E731
        refuses(StateError, type(network).__name__, "no preprocess", "Normalize", call=call)


# --- layers of one's own --------------------------------------------------------------------------


@pytest.fixture
def known(monkeypatch):
    """Layers and emitters that a test makes are forgotten after it."""
    monkeypatch.setattr(Layer, "known", dict(Layer.known))
    monkeypatch.setattr(building, "_emitters", dict(building._emitters))


def square_layer():
    class Square(Layer):
        def infer(self, shape):
            self.declare("factor", (shape[0],), "ones")
            return shape

        def forward(self, x, *, train=False, keep=True):
            shape = (-1, *(1 for _ in x.shape[2:]))
            return x * x * backend_of(x).xp.reshape(self.params["factor"], shape), None

    return Square


def test_a_layer_without_an_emitter(known, tmp_path):
    kind = square_layer()
    network = Sequential(Linear(3, 2), inner=Sequential(odd=kind())).build((3,), device="numpy")
    words = ("inner.odd (Square)", "no ONNX emitter", "@portacnn.onnx.emitter(Square)")
    refuses(ArgumentError, *words, call=lambda: public_export(network, tmp_path / "m.onnx"))
    assert not list(tmp_path.iterdir())


def test_an_emitter_of_ones_own(known, tmp_path):
    kind = square_layer()

    @portacnn.onnx.emitter(kind)
    def square(graph, layer, x):
        factor = graph.reshape(graph.weight(layer, "factor"), (*layer.input_shape[:1], 1, 1))
        assert graph.weight(layer, "factor") == graph.weight(layer, "factor")
        return graph.add("Mul", [graph.add("Mul", [x, x]), factor])

    network = Sequential(conv=Conv2d(1, 2, 3), odd=kind(), act=ReLU()).build(
        (1, 5, 5), device="numpy", seed=0
    )
    agrees(filled(network), tmp_path)
    names = [node.name for node in nodes(tmp_path / "model.onnx")]
    assert names == ["conv/Conv", "odd/Constant", "odd/Reshape", "odd/Mul", "odd/Mul_1", "act/Relu"]


@pytest.mark.parametrize("name", ["Mul", "input", "output"])
def test_parameters_called_as_something_else_is(name, known, tmp_path):
    """A node makes way for them. The file's input and output do not."""

    class Scaled(Layer):
        def infer(self, shape):
            self.declare(name, (1,), "ones")
            return shape

        def forward(self, x, *, train=False, keep=True):
            return x * self.params[name], None

    @portacnn.onnx.emitter(Scaled)
    def scaled(graph, layer, x):
        return graph.add("Sigmoid", [graph.add("Mul", [x, graph.weight(layer, name)])])

    layer = Scaled().build((3,), device="numpy")
    if name == "Mul":
        assert [node.name for node in nodes(export(layer, tmp_path))] == ["Mul_1", "Sigmoid"]
    else:
        refuses(
            ArgumentError,
            "Scaled",
            f"got '{name}' twice",
            call=lambda: export(layer, tmp_path),
        )


def test_an_output_that_is_not_the_last_value(known, tmp_path):
    class Doubled(Layer):
        def infer(self, shape):
            return shape

        def forward(self, x, *, train=False, keep=True):
            return x + x, None

    @portacnn.onnx.emitter(Doubled)
    def doubled(graph, layer, x):
        y = graph.add("Add", [x, x])
        graph.add("Neg", [y])
        return y

    agrees(Doubled().build((3,), device="numpy"), tmp_path)


def test_emitters_that_make_no_sense(known, tmp_path):
    network = Sequential(odd=square_layer()()).build((2, 3), device="numpy")
    call = lambda: public_export(network, tmp_path / "m.onnx")  # noqa: E731
    portacnn.onnx.emitter(type(network.children["odd"]))(lambda graph, layer, x: None)
    refuses(ArgumentError, "odd (Square)", "None", "name of a value", call=call)
    portacnn.onnx.emitter(type(network.children["odd"]))(
        lambda graph, layer, x: graph.add("Sqare", [x])
    )
    refuses(ModelFormatError, "Sqare", call=call)
    portacnn.onnx.emitter(type(network.children["odd"]))(
        lambda graph, layer, x: graph.add("ReduceMax", [x], keepdims=0)
    )
    refuses(ModelFormatError, "not be valid", call=call)
    assert not list(tmp_path.iterdir())


def test_layers_that_derive(known, tmp_path):
    class Same(L.LeakyReLU):
        def __init__(self):
            super().__init__(0.2)

    class Other(ReLU):
        def forward(self, x, *, train=False, keep=True):
            return x, None

    class Net(M.Model):
        def __init__(self):
            super().__init__(fc=Linear(3, 2), act=Same())

    agrees(filled(Net().build((3,), device="numpy")), tmp_path)
    network = Sequential(act=Other()).build((3,), device="numpy")
    words = ("act (Other)", "derives from ReLU", "overrides forward", "emitter(Other)")
    refuses(ArgumentError, *words, call=lambda: public_export(network, tmp_path / "m.onnx"))


# --- files ----------------------------------------------------------------------------------------


def test_dropout_is_told_to_whoever_trains_the_file(tmp_path):
    path = export(
        Sequential(drop=L.Dropout(0.3), more=L.Dropout2d(0.3)).build((2, 3, 3), device="numpy"),
        tmp_path,
    )
    (constant, dropout) = nodes(path)
    assert (dropout.name, dropout.op_type) == ("drop/Dropout", "Dropout")
    assert onnx.numpy_helper.to_array(constant.attribute[0].t) == np.float32(0.3)


def test_momentum_is_told_in_onnxs_way(tmp_path):
    """There it is the share of the running statistics that stays."""
    network = Sequential(
        a=L.BatchNorm1d(3, momentum=0.25), b=L.BatchNorm1d(3, momentum=None)
    ).build((3,), device="numpy")
    first, second = (
        {attribute.name: attribute.f for attribute in node.attribute}
        for node in nodes(export(network, tmp_path))
    )
    assert first["momentum"] == 0.75
    assert "momentum" not in second


def test_the_same_file_twice(tmp_path):
    model = M.LeNet5(device="numpy", seed=0)
    first = export(model, tmp_path).read_bytes()
    assert export(model, tmp_path).read_bytes() == first


def test_without_onnx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    network = Linear(3, 2).build((3,), device="numpy")
    call = lambda: public_export(network, tmp_path / "m.onnx")  # noqa: E731
    refuses(DependencyError, "onnx is not installed", 'pip install "portacnn[onnx]"', call=call)
    with pytest.raises(ImportError):
        call()


def test_a_folder_that_is_not_there(tmp_path):
    network = Linear(3, 2).build((3,), device="numpy")
    with pytest.raises(FileNotFoundError):
        public_export(network, tmp_path / "none" / "m.onnx")


@pytest.fixture
def small_files(monkeypatch):
    """As if a file could hold next to nothing: the weights go beside it."""
    monkeypatch.setattr(exporting, "_INLINE", 1000)


def beside(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "model.onnx")


def test_weights_beside_the_file(small_files, tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    path = export(model, tmp_path)
    (name,) = beside(tmp_path)
    assert re.fullmatch(r"model\.onnx\.[0-9a-f]{16}\.data", name)
    assert path.stat().st_size < 10_000
    x = images(model, 7)
    close(run(path, x), model.predict(x))
    file = onnx.load(path, load_external_data=False)
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in file.graph.initializer
    }
    assert places["fc1.bias"] == {}
    assert places["fc1.weight"]["location"] == name
    assert all(int(place["offset"]) % 4096 == 0 for place in places.values() if place)
    loaded = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
    }
    assert all(np.array_equal(loaded[name], array) for name, array in model.state_dict().items())


def test_a_second_export_leaves_no_weights_behind(small_files, tmp_path, monkeypatch):
    (tmp_path / "other.onnx.0123456789abcdef.data").write_bytes(b"another's")
    (tmp_path / "model.onnx.data").write_bytes(b"another's")
    foreign = beside(tmp_path)
    export(M.SimpleConvNet(device="numpy", seed=0), tmp_path)
    first = set(beside(tmp_path))
    export(M.SimpleConvNet(device="numpy", seed=1), tmp_path)
    second = set(beside(tmp_path))
    assert len(first & second) == len(foreign)
    assert len(second) == len(foreign) + 1
    monkeypatch.setattr(exporting, "_INLINE", 1 << 30)
    export(M.SimpleConvNet(device="numpy", seed=2), tmp_path)
    assert beside(tmp_path) == foreign


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_fills_up_leaves_what_was_there(failing, small_files, monkeypatch, tmp_path):
    model = M.SimpleConvNet(device="numpy", seed=0)
    path, x = export(model, tmp_path), images(model, 2)
    before, names = model.predict(x), beside(tmp_path)
    write, calls = exporting.write_atomically, []

    def full(target, content):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        write(target, content)

    monkeypatch.setattr(exporting, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        public_export(M.SimpleConvNet(device="numpy", seed=1), path)
    assert len(calls) == failing
    assert beside(tmp_path) == names
    close(run(path, x), before)


@pytest.mark.slow
def test_more_than_two_gigabytes(tmp_path):
    network = Sequential(
        wide=Linear(24_000, 24_000, bias=False, weight_init="zeros"), fc=Linear(24_000, 3)
    )
    network.build((24_000,), device="numpy", seed=0)
    network.children["wide"].params["weight"][-1, :7] = 1.0
    path = export(network, tmp_path)
    assert path.stat().st_size < 1 << 20
    (name,) = beside(tmp_path)
    assert (tmp_path / name).stat().st_size > 2 << 30
    x = images(network, 1)
    expected = network(x)
    del network  # each copy of its weights is a tenth of many a machine's memory
    close(run(path, x), expected)
    close(portacnn.onnx.load(path, device="numpy").predict(x), expected)
    (tmp_path / name).unlink()  # pytest would keep it
