"""Every layer's backward pass against central differences: for what it takes, each of its
parameters, in training and out of it. Nothing but forward passes is asked, and no other library."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from portacnn import layers as L
from portacnn.layers import at_step, one_backward_pass
from portacnn.ops.pointwise import ARITHMETIC, FUNCTIONS
from portacnn.ops.reduce import REDUCTIONS
from portacnn.testing import check_layer
from portacnn.testing.gradients import distinct as kit_distinct
from support.checks import distinct, normal, slopes_agree

MAPS, ROWS = (3, 3, 4), (4, 5)  # samples (C, H, W), (C, L)
Make = Callable[[], Any]
ONE: dict[str, tuple[Make, tuple[int, ...]]] = {
    "AdaptiveAvgPool1d": (lambda: L.AdaptiveAvgPool1d(2), ROWS),
    "AdaptiveAvgPool2d": (lambda: L.AdaptiveAvgPool2d((2, 3)), MAPS),
    "AdaptiveAvgPool3d": (lambda: L.AdaptiveAvgPool3d(2), (1, 3, 3, 2)),
    "AdaptiveMaxPool1d": (lambda: L.AdaptiveMaxPool1d(2), ROWS),
    "AdaptiveMaxPool2d": (lambda: L.AdaptiveMaxPool2d((2, 3)), MAPS),
    "AdaptiveMaxPool3d": (lambda: L.AdaptiveMaxPool3d(2), (1, 3, 3, 2)),
    "AvgPool1d": (lambda: L.AvgPool1d(3, 2, 1, True, False), ROWS),
    "AvgPool2d": (lambda: L.AvgPool2d(2, 1, dilation=2), MAPS),
    "AvgPool3d": (lambda: L.AvgPool3d(2, 1), (1, 3, 3, 2)),
    "BatchNorm1d": (lambda: L.BatchNorm1d(4), ROWS),
    "BatchNorm2d": (lambda: L.BatchNorm2d(3, momentum=None), MAPS),
    "BatchNorm3d": (lambda: L.BatchNorm3d(2, track_running_stats=False), (2, 2, 2, 2)),
    "Branches": (lambda: L.Branches(L.Conv2d(3, 2, 1), L.ReLU()), MAPS),
    "Branches added": (lambda: L.Branches(L.Conv2d(3, 3, 1), L.ReLU(), join="add"), MAPS),
    "Crop": (lambda: L.Crop([(1, 0), (0, 1)]), MAPS),
    "CenterCrop": (lambda: L.CenterCrop((2, 2)), MAPS),
    "PixelShuffle": (lambda: L.PixelShuffle(2), (4, 2, 2)),
    "PixelUnshuffle": (lambda: L.PixelUnshuffle(2), (1, 4, 2)),
    "SqueezeExcitation": (lambda: L.SqueezeExcitation(3, 2), MAPS),
    "StochasticDepth": (lambda: L.StochasticDepth(0.4), MAPS),
    "Upsample": (lambda: L.Upsample(scale_factor=2, mode="bilinear"), MAPS),
    "CELU": (lambda: L.CELU(0.7), ROWS),
    "Clip": (lambda: L.Clip(-0.4, 0.6), ROWS),
    "Conv1d": (lambda: L.Conv1d(4, 2, 2, padding="same", groups=2), ROWS),
    "Conv2d": (lambda: L.Conv2d(3, 2, 2, padding="same", padding_mode="reflect"), MAPS),
    "Conv3d": (lambda: L.Conv3d(1, 2, 2, 2, 1), (1, 2, 3, 3)),
    "ConvTranspose1d": (lambda: L.ConvTranspose1d(4, 2, 2, 2, 1, 1, 2), ROWS),
    "ConvTranspose2d": (lambda: L.ConvTranspose2d(3, 2, 2, 2, dilation=2), MAPS),
    "ConvTranspose3d": (lambda: L.ConvTranspose3d(1, 2, 2), (1, 2, 2, 2)),
    "Dropout": (lambda: L.Dropout(0.4), ROWS),
    "Dropout1d": (lambda: L.Dropout1d(0.4), ROWS),
    "Dropout2d": (lambda: L.Dropout2d(0.4), MAPS),
    "Dropout3d": (lambda: L.Dropout3d(0.4), (2, 2, 2, 2)),
    "ELU": (lambda: L.ELU(0.7), ROWS),
    "Flatten": (lambda: L.Flatten(), MAPS),
    "GELU": (lambda: L.GELU(), ROWS),
    "GELU tanh": (lambda: L.GELU("tanh"), ROWS),
    "GlobalAvgPool": (lambda: L.GlobalAvgPool(), MAPS),
    "GlobalMaxPool": (lambda: L.GlobalMaxPool(flatten=True), MAPS),
    "Graph": (
        lambda: L.Graph(
            ("a", L.Conv2d(3, 3, 1), ["input"]),
            ("b", L.ReLU(), ["a"]),
            ("c", L.Arithmetic("multiply"), ["b", "a"]),
            ("d", L.Concat(), ["c", "input", "a"]),
        ),
        MAPS,
    ),
    "GroupNorm": (lambda: L.GroupNorm(2, 4), ROWS),
    "HardSigmoid": (lambda: L.HardSigmoid(0.3, 0.4), ROWS),
    "HardSwish": (lambda: L.HardSwish(), ROWS),
    "InstanceNorm1d": (lambda: L.InstanceNorm1d(4, affine=True), ROWS),
    "InstanceNorm2d": (lambda: L.InstanceNorm2d(3, track_running_stats=True), MAPS),
    "InstanceNorm3d": (lambda: L.InstanceNorm3d(2, affine=True), (2, 2, 2, 2)),
    "LayerNorm": (lambda: L.LayerNorm((3, 4)), MAPS),
    "LeakyReLU": (lambda: L.LeakyReLU(0.3), ROWS),
    "Linear": (lambda: L.Linear(5, 3), (5,)),
    "LocalResponseNorm": (lambda: L.LocalResponseNorm(2, 0.5), ROWS),
    "LogSoftmax": (lambda: L.LogSoftmax(1), ROWS),
    "MatMulWith": (lambda: L.MatMulWith(3), ROWS),
    "MaxPool1d": (lambda: L.MaxPool1d(3, 2, 1, ceil_mode=True), ROWS),
    "MaxPool2d": (lambda: L.MaxPool2d(2, 1, dilation=2), MAPS),
    "MaxPool3d": (lambda: L.MaxPool3d(2, 1), (1, 3, 3, 2)),
    "MergeIntoBatch": (lambda: L.MergeIntoBatch(3), MAPS),
    "SplitFromBatch, the inverse": (
        lambda: L.Sequential(L.MergeIntoBatch(3), L.Conv1d(3, 2, 2), L.SplitFromBatch(3)),
        MAPS,
    ),
    "PReLU": (lambda: L.PReLU((3, 1, 1)), MAPS),
    "Pad": (lambda: L.Pad(((0, 0), (2, 1), (0, 3)), "reflect"), MAPS),
    "Permute": (lambda: L.Permute((0, 3, 1, 2)), MAPS),
    "ReLU": (lambda: L.ReLU(), ROWS),
    "Recompute": (lambda: L.Recompute(L.Sequential(L.Linear(5, 4), L.Dropout(0.4))), (5,)),
    "Reshape": (lambda: L.Reshape((2, 2, 9)), MAPS),
    "Residual": (
        lambda: L.Residual(L.Conv2d(3, 2, 1), L.Conv2d(3, 2, 1), activation=L.ReLU()),
        MAPS,
    ),
    "SELU": (lambda: L.SELU(), ROWS),
    "Sequential": (lambda: L.Sequential(L.Conv2d(3, 2, 2), L.ReLU(), L.MaxPool2d(2)), MAPS),
    "Sequential, its norm": (lambda: L.Sequential(L.BatchNorm2d(3), L.ReLU()), MAPS),
    "SiLU": (lambda: L.SiLU(), ROWS),
    "Sigmoid": (lambda: L.Sigmoid(), ROWS),
    "Constant": (lambda: L.Constant((2, 4)), ROWS),
    "Expand": (lambda: L.Expand((4, 5)), (1, 5)),
    **{
        f"Reduce {kind}": (lambda k=kind: L.Reduce(k, (1, 3)), MAPS)  # type: ignore[misc]
        for kind in REDUCTIONS
    },
    "Slice": (lambda: L.Slice((0, 1, 0), (3, 3, 4), (2, 1, 3)), MAPS),
    "Softmax": (lambda: L.Softmax(1), ROWS),
    "Softplus": (lambda: L.Softplus(2.0, 1.0), ROWS),
    "Take": (lambda: L.Take([2, 0, 2], 1), MAPS),
    "Tanh": (lambda: L.Tanh(), ROWS),
    **{
        f"Elementwise {function}": (lambda f=function: L.Elementwise(f), ROWS)  # type: ignore[misc]
        for function in FUNCTIONS
    },
    **{
        f"ArithmeticWith {kind}{' first' * first}": (
            lambda k=kind, f=first: L.ArithmeticWith(k, (3, 1, 1), constant_first=f),  # type: ignore[misc]
            MAPS,
        )
        for kind in ARITHMETIC
        for first in (False, True)
    },
}
SEVERAL: dict[str, tuple[Make, list[tuple[int, ...]]]] = {
    **{
        f"Arithmetic {kind}": (lambda k=kind: L.Arithmetic(k), [(3, 2, 4), (3, 1, 4)])  # type: ignore[misc]
        for kind in ARITHMETIC
    },
    "Concat": (lambda: L.Concat(2), [(3, 2, 4), (3, 1, 4), (3, 3, 4)]),
    "MatMul": (lambda: L.MatMul(), [(2, 3, 2), (2, 2, 4)]),
    "MatMul broadcast": (lambda: L.MatMul(), [(2, 3, 2), (1, 2, 4)]),
    "Where": (lambda: L.Where(), [(3, 1), (3, 4), (1, 4)]),
}
POSITIVE = ("log", "sqrt", "divide", "first", "reciprocal", "acosh", "fmod", "prod", "log_sum")
NOT_THERE = {"Layer", "Join"}  # others derive from them
# their gradient is not the slope, see tests/onnx/test_quantized.py
NOT_THERE |= {"Quantize", "Dequantize"}


def test_every_layer_is_here():
    kinds = {name: kind for name, kind in vars(L).items() if isinstance(kind, type)}
    layers = {name for name, kind in kinds.items() if issubclass(kind, L.Layer)}
    assert {name.split()[0].rstrip(",") for name in (*ONE, *SEVERAL)} == layers - NOT_THERE


def within(name: str, x: np.ndarray) -> np.ndarray:
    """x, moved to where the function is defined and has a slope."""
    word = name.split()[-1]
    if word in ("acos", "asin", "atanh"):
        return 0.9 * np.tanh(x)
    if word in ("sign", "ceil", "floor", "round"):
        return x + 0.0137
    return np.abs(x) + 1.01 if "power" in name or word in POSITIVE else x


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ONE if name != "MergeIntoBatch"])
def test_every_layer_passes_the_kit(name: str):
    """But one that changes the number of samples."""
    make, shape = ONE[name]
    report = check_layer(
        make,
        shape,
        inputs=lambda shape: within(name, kit_distinct(shape)),
        devices=["array_api_strict:device1"],
    )
    report.raise_if_wrong()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", [*ONE, *SEVERAL])
def test_gradients_agree_with_numerical_gradients(name: str, train: bool):
    make, shapes = (ONE | SEVERAL)[name]
    several = name in SEVERAL
    layer = make()
    given = [
        distinct(2, *shape, seed=i) / 2 for i, shape in enumerate(shapes if several else [shapes])
    ]
    given = [within(name, x + 0.0137 * i) for i, x in enumerate(given)]  # no ties
    if several:
        layer.plan(tuple(shapes), "")
    else:
        layer.build(shapes, device="numpy", dtype="float64", seed=0)
    for number, array in enumerate(layer.named_parameters().values()):
        array[...] = 0.5 + 0.2 * normal(*array.shape, seed=number)
    buffers = {path: array.copy() for path, array in layer.named_buffers().items()}

    def forward(keep: bool) -> Any:
        for path, array in layer.named_buffers().items():
            array[...] = buffers[path]
        with at_step(3):
            return layer.forward(given if several else given[0], train=train, keep=keep)

    y, cache = forward(keep=True)
    dy = normal(*y.shape, seed=9)
    with one_backward_pass():
        dx = layer.backward(dy, cache)
    found = dx if several else [dx]
    found = [*(np.array(each) for each in found), *map(np.array, layer.named_gradients().values())]
    places = [*given, *(layer.named_parameters()[path] for path in layer.named_gradients())]
    assert layer.named_gradients().keys() == layer.named_parameters().keys()
    for gradient, place in zip(found, places, strict=True):

        def loss(values: np.ndarray, place: np.ndarray = place) -> float:
            before = place.copy()
            place[...] = values
            total = float((forward(keep=False)[0] * dy).sum())
            place[...] = before
            return total

        slopes_agree(gradient, loss, place.copy())
