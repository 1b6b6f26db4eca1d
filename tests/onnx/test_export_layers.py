"""Every layer, container and model as an ONNX file: onnxruntime gives what the network gives."""

import sys

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from portacnn import layers as L
from portacnn import models as M
from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers import Conv2d, Flatten, Layer, Linear, ReLU, Residual, Sequential
from portacnn.models.lenet5 import ScaledTanh, TableConv2d
from portacnn.models.resnet import PadChannels
from portacnn.onnx import export as public_export
from support.onnx_export import MODELS, NEWEST, OPSETS, agrees, filled

exporting, building = sys.modules["portacnn.onnx.export"], sys.modules["portacnn.onnx.builder"]


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
            *("abs", "cos", "erf", "exp", "mish", "negative", "reciprocal", "sin", "softsign"),
            *("ceil", "floor", "logical_not", "nonzero", "round", "sign"),
        )
    ),
    (L.Sequential, (L.Tanh(), *map(L.Elementwise, ("asin", "sinh", "atan"))), {}, (2, 3)),
    (L.Sequential, (L.Tanh(), *map(L.Elementwise, ("acos", "cosh", "acosh"))), {}, (2, 3)),
    (L.Sequential, (*map(L.Elementwise, ("softsign", "atanh", "sin", "tan", "asinh")),), {}, (7,)),
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
    *(
        (L.Reduce, (kind, (1, 3)), {}, (2, 3, 4))
        for kind in ("l1", "l2", "log_sum_exp", "max", "min", "prod", "sum_square")
    ),
    (L.Sequential, (L.Sigmoid(), L.Reduce("log_sum", (1,))), {}, (2, 3)),
    (L.Expand, ((2, 3),), {}, (2, 1)),
    (L.MatMulWith, (5,), {}, (2, 3, 4)),
    *(
        (L.ArithmeticWith, (kind, (2, 1, 1)), {"constant_first": first}, (2, 3, 4))
        for kind in ("add", "subtract", "multiply", "divide", "maximum", "minimum")
        for first in (False, True)
    ),
    *(
        (L.ArithmeticWith, (kind, (2, 1, 1)), {}, (2, 3, 4))
        for kind in ("fmod", "greater", "less", "greater_equal", "less_equal", "logical_and")
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
    "Quantize": (lambda: Sequential(L.Quantize(), L.Dequantize()), (2, 3)),
    "Quantize channels": (
        lambda: Sequential(L.Quantize("uint8", 1), L.Dequantize("uint8", 1)),
        (2, 3),
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
            ("less", L.Arithmetic("not_equal"), ["subtract", "f"]),
            ("equal", L.Arithmetic("equal"), ["f", "f"]),
            ("or", L.Arithmetic("logical_or"), ["less", "equal"]),
            ("xor", L.Arithmetic("logical_xor"), ["or", "less"]),
            ("row", L.Constant((8, 4, 1)), ["xor"]),
            ("where", L.Where(), ["xor", "row", "subtract"]),
        ),
        (3, 4, 5),
    ),
    "Rows": (
        lambda: Sequential(
            L.MergeIntoBatch(3), L.Conv1d(4, 2, 3), L.SplitFromBatch(3), L.Permute((0, 2, 1, 3))
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


@pytest.mark.parametrize(
    ("kind", "args", "kwargs", "shape"),
    CASES,
    ids=[f"{case[0].__name__}-{i}" for i, case in enumerate(CASES)],
)
def test_every_layer_agrees_with_onnxruntime(kind, args, kwargs, shape, tmp_path):
    network = filled(kind(*args, **kwargs).build(shape, device="numpy", seed=0))
    over_batch = kind is L.Softmax and args == (0,)  # is not read: samples are independent
    agrees(network, tmp_path, OPSETS, back=not over_batch)


def test_no_layer_is_missing():
    """Put a row for it into CASES."""
    nested = [part for make, _ in NESTED.values() for part in make().walk()]
    tried = {kind for kind, *_ in CASES} | {type(part) for part in nested}
    kinds = {name for name in L.__all__ if isinstance(getattr(L, name), type)}
    layers = {name for name in kinds if issubclass(getattr(L, name), L.Layer)}
    assert layers - {kind.__name__ for kind in tried} == {"Layer", "Join"}


@pytest.mark.parametrize("name", NESTED)
def test_every_container_agrees_with_onnxruntime(name, tmp_path):
    make, shape = NESTED[name]
    # onnxruntime does not know the newest QuantizeLinear yet
    opsets = OPSETS[:-1] if "Quantize" in name else OPSETS
    agrees(filled(make().build(shape, device="numpy", seed=0)), tmp_path, opsets)


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
def test_models_agree_with_onnxruntime(name, tmp_path):
    agrees(MODELS[name](device="numpy", seed=0), tmp_path, (18, NEWEST))


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_big_models_agree_with_onnxruntime(name, tmp_path):
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
    max_examples=200,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(kind=st.sampled_from(WINDOWS), data=st.data())
def test_drawn_geometries_agree_with_onnxruntime(kind, data, tmp_path):
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
    agrees(layer, tmp_path, (data.draw(st.sampled_from(OPSETS)),), back=kind is L.MaxPool2d)


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
    tested |= {L.Arithmetic, L.Concat, L.MatMul, L.Where, L.Constant}  # in the graph
    tested |= {L.MergeIntoBatch, L.SplitFromBatch}  # in "Rows"
    tested |= {L.Quantize, L.Dequantize}  # one after the other
    tested |= {getattr(M, name.split()[0]) for name in [*MODELS, *BIG]}
    own = {kind for kind in Layer.known.values() if kind.__module__.partition(".")[0] == "portacnn"}
    assert {kind.__name__ for kind in own} == {kind.__name__ for kind in tested} | BASES
