"""Receptive fields, against which pixels change a unit when each is changed in turn."""

import numpy as np
import pytest

from portacnn.errors import ArgumentError, ShapeError, StateError
from portacnn.layers import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Branches,
    Conv1d,
    Conv2d,
    ConvTranspose2d,
    Crop,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Layer,
    Linear,
    MaxPool2d,
    Pad,
    PixelShuffle,
    PixelUnshuffle,
    ReLU,
    Residual,
    Sequential,
    Slice,
    Upsample,
    receptive_field,
)
from portacnn.models import UNet


def pixels_that_count(net, path, unit):
    """(first, last + 1) on each axis of the pixels that change a unit. All weights are 1, so that
    nothing cancels."""
    for name, array in net.named_parameters().items():
        array[...] = 0.0 if name.endswith("bias") else 1.0
    seen = []
    handle = net.layer_at(path).on_output(lambda y: seen.append(y))
    _, *size = net.input_shape
    net(np.zeros((1, *net.input_shape), net.dtype))
    changed = np.zeros(size, bool)
    for place in np.ndindex(*size):
        x = np.zeros((1, *net.input_shape), net.dtype)
        x[(0, slice(None), *place)] = 1.0
        net(x)
        difference = (seen[-1] - seen[0])[0].max(axis=0)
        changed[place] = difference[unit] > 1e-9
    handle.remove()
    return tuple(
        (int(found.min()), int(found.max()) + 1) for found in map(np.asarray, changed.nonzero())
    )


NETS = {
    "convolutions and pooling": lambda: Sequential(
        a=Conv2d(1, 2, (3, 5), padding="same"),
        b=MaxPool2d(3, 2, 1),
        c=ReLU(),
        d=Conv2d(2, 2, 3, stride=2, padding=1, dilation=2),
    ),
    "average pooling": lambda: Sequential(a=AvgPool2d(2, ceil_mode=True), d=Conv2d(1, 1, 2)),
    "padding in pairs": lambda: Sequential(d=Conv2d(1, 1, 4, padding=((3, 0), (1, 2)))),
    "parallel": lambda: Sequential(
        a=Branches(Conv2d(1, 1, 3, padding=1), Conv2d(1, 1, 5, padding=2), Sequential()),
        d=MaxPool2d(2),
    ),
    "residual": lambda: Sequential(
        a=Residual(
            Sequential(p=Conv2d(1, 2, 3, 2, 1), q=Conv2d(2, 2, 3, 1, 1), r=BatchNorm2d(2)),
            Conv2d(1, 2, 1, 2),
            activation=ReLU(),
        ),
        d=Dropout(),
    ),
    "nearest": lambda: Sequential(
        a=Conv2d(1, 1, 3, 2, 1), b=Upsample(scale_factor=2), d=Conv2d(1, 1, 1)
    ),
    "transposed": lambda: Sequential(d=ConvTranspose2d(1, 1, 3, 2, 1)),
    "shuffled": lambda: Sequential(a=Conv2d(1, 4, 3, padding=1), d=PixelShuffle(2)),
    "unshuffled": lambda: Sequential(a=PixelUnshuffle(2), d=Conv2d(4, 1, 2)),
    "cut and padded": lambda: Sequential(
        a=Crop([(2, 1), (0, 3)]),
        b=Pad([(0, 0), (1, 1), (1, 0)]),
        c=Slice((0, 1, 0), (1, 9, 8), (1, 2, 1)),
        d=Conv2d(1, 1, 2),
    ),
    "shares": lambda: Sequential(a=Conv2d(1, 1, 3, padding=1), d=AdaptiveAvgPool2d((5, 3))),
    "the whole image": lambda: Sequential(
        a=Conv2d(1, 2, 3), b=GlobalAvgPool(), c=Flatten(), d=Linear(None, 2)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_what_changes_a_unit(name):
    net = NETS[name]().build((1, 12, 12), device="cpu", dtype="float64")
    field = receptive_field(net, "d")
    units = net.layer_at("d").output_shape[1:]
    middle = tuple(n // 2 for n in units)
    for unit in {(), middle, (0,) * len(units), tuple(n - 1 for n in units)}:
        if len(unit) == len(units):
            found, counted = field.pixels(unit), pixels_that_count(net, "d", unit)
            if name == "nearest":  # rounded outwards, by a pixel at most
                for (a, b), (first, last) in zip(counted, found, strict=True):
                    assert 0 <= a - first <= 1
                    assert 0 <= last - b <= 1
            else:
                assert found == counted, unit
    assert field.pixels() == field.pixels(middle)
    for (first, last), size in zip(field.pixels(middle), field.size, strict=True):
        assert last - first <= size


@pytest.mark.parametrize("align", [False, True])
def test_interpolation_is_within_it(align):
    net = Sequential(d=Upsample(scale_factor=1.5, mode="bilinear", align_corners=align))
    net.build((1, 12, 12), device="cpu", dtype="float64")
    field = receptive_field(net, "d")
    for unit in ((0, 0), (7, 8), (17, 17)):
        for (a, b), (first, last) in zip(
            pixels_that_count(net, "d", unit), field.pixels(unit), strict=True
        ):
            assert first <= a < b <= last
            assert last - first <= 5


def test_size_stride_and_offset_of_known_networks():
    """VGG's conv5_3 and the last block of ResNet-18: 196 and 435 pixels, as published (Araujo et
    al., 2019, table)."""
    layers, channels = {}, 1
    for stage, count in enumerate((2, 2, 3, 3, 3), 1):
        for number in range(1, count + 1):
            layers[f"conv{stage}_{number}"] = Conv2d(channels, 1, 3, padding=1)
        layers[f"pool{stage}"] = MaxPool2d(2)
    net = Sequential(**layers).build((1, 224, 224), device="cpu")
    field = receptive_field(net, "conv5_3")
    assert (field.size, field.stride, field.units) == ((196, 196), (16, 16), (14, 14))
    assert field.offset == (-90, -90)

    def block(stride):
        body = Sequential(a=Conv2d(1, 1, 3, stride, 1), b=Conv2d(1, 1, 3, 1, 1))
        return Residual(body, Conv2d(1, 1, 1, stride) if stride > 1 else None)

    blocks = {f"block{i}": block(2 if i in (2, 4, 6) else 1) for i in range(8)}
    net = Sequential(conv1=Conv2d(1, 1, 7, 2, 3), pool=MaxPool2d(3, 2, 1), **blocks)
    field = receptive_field(net.build((1, 64, 64), device="cpu"), "block7")
    assert (field.size, field.stride) == ((435, 435), (32, 32))


def test_a_graph():
    """Its way through the bottom, and the skip connection, are united."""
    net = UNet(1, 2, depth=2, width=2, up="transpose", input_size=8, device="cpu", dtype="float64")
    last = net.graph.nodes[-1].name
    field = receptive_field(net, last)
    assert field.stride == (1, 1)
    for (a, b), (first, end) in zip(
        pixels_that_count(net, last, (4, 4)), field.pixels((4, 4)), strict=True
    ):
        assert first <= a < b <= end
        assert (a - first) + (end - b) <= 6


def test_one_axis_and_the_whole_image():
    net = Sequential(a=Conv1d(1, 1, 3), b=GroupNorm(1, 1)).build((1, 9), device="cpu")
    assert receptive_field(net, "a").pixels((2,)) == ((2, 5),)
    norm = receptive_field(net, "b")
    assert (norm.size, norm.stride, norm.pixels((2,))) == ((9,), (0,), ((0, 9),))


class Twice(Layer):
    def infer(self, shape):
        return shape

    def forward(self, x, *, train=False, keep=True):
        return 2 * x, None


def test_what_is_not_known():
    with pytest.raises(StateError, match="not built"):
        receptive_field(Sequential(a=Conv2d(1, 1, 3)), "a")
    net = Sequential(a=Twice(), b=ReLU()).build((1, 4, 4), device="cpu")
    with pytest.raises(ArgumentError, match=r"a \(Twice\): its receptive field is not known"):
        receptive_field(net, "b")
    with pytest.raises(ArgumentError, match="'c'"):
        receptive_field(net, "c")
    net = Sequential(a=Linear(3, 3)).build((3,), device="cpu")
    with pytest.raises(ShapeError, match="no spatial axes"):
        receptive_field(net, "a")
    net = Sequential(a=Conv2d(1, 1, 3)).build((1, 8, 8), device="cpu")
    with pytest.raises(ArgumentError, match=r"a has units \(6, 6\).* got \(6, 0\)"):
        receptive_field(net, "a").pixels((6, 0))
