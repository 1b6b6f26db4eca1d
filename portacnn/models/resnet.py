"""Residual networks (He et al., 2015)."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import one_of, whole
from portacnn.errors import PortacnnError, ShapeError
from portacnn.init import Initializer
from portacnn.layers import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    GlobalAvgPool,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
)
from portacnn.layers import Sequential as Seq
from portacnn.layers.base import Shape
from portacnn.layers.receptive import pointwise, reach
from portacnn.models.inputs import image_shape
from portacnn.models.model import Model
from portacnn.runtime import Array, Backend

Shortcut = Callable[[int, int], Layer]
"""(out channels, stride) -> the shortcut layer of a block that changes the shape."""


class PadChannels(Layer):
    """Add channels of zeros, half of them before and half after: x (N, C, *S) -> y (N, O, *S).

    This is the shortcut of option A.

    Args:
        out_channels: O.
    """

    def __init__(self, out_channels: int) -> None:
        try:
            self.out_channels = whole("out_channels", out_channels, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        if not shape or shape[0] > self.out_channels:
            raise ShapeError(
                f"expected samples (C, *S) of at most {self.out_channels} channels, got {shape}"
            )
        return (self.out_channels, *shape[1:])

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        more = self.out_channels - x.shape[1]
        pads = [0, 0] * (x.ndim - 2) + [more // 2, more - more // 2]  # the last axis first
        return ops.pad(x, pads, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return ops.pad_backward(dy, cache)


reach.register(PadChannels, pointwise)


# --- shortcuts and blocks -------------------------------------------------------------------------


def _conv(channels: int, kernel: int, stride: int, init: Initializer) -> Conv2d:
    """Return a convolution without a bias and with "same" padding.

    Batch norm follows, which makes a bias redundant.
    """
    return Conv2d(None, channels, kernel, stride, kernel // 2, bias=False, weight_init=init)


def _projection(init: Initializer) -> Shortcut:
    """Return the shortcut of option B: a 1x1 convolution and batch norm."""
    return lambda channels, stride: Seq(_conv(channels, 1, stride, init), BatchNorm2d(channels))


def _subsample(channels: int, stride: int) -> Layer:
    """Return the shortcut of option A: every stride-th pixel, and zeros for the new channels. It
    has no parameters."""
    return Seq(AvgPool2d(1, stride), PadChannels(channels))


def basic_block(channels: int, stride: int, shortcut: Layer | None, init: Initializer) -> Layer:
    """Return a residual block of two 3x3 convolutions."""
    body = Seq(
        conv1=_conv(channels, 3, stride, init),
        bn1=BatchNorm2d(channels),
        relu=ReLU(),
        conv2=_conv(channels, 3, 1, init),
        bn2=BatchNorm2d(channels),
    )
    return Residual(body, shortcut, activation=ReLU())


def bottleneck(channels: int, stride: int, shortcut: Layer | None, init: Initializer) -> Layer:
    """Return a residual block: 1x1 to a quarter of the channels, 3x3, and 1x1 back.

    The stride is in the 3x3 convolution (torchvision's variant, called v1.5).
    """
    narrow = channels // 4
    body = Seq(
        conv1=_conv(narrow, 1, 1, init),
        bn1=BatchNorm2d(narrow),
        relu1=ReLU(),
        conv2=_conv(narrow, 3, stride, init),
        bn2=BatchNorm2d(narrow),
        relu2=ReLU(),
        conv3=_conv(channels, 1, 1, init),
        bn3=BatchNorm2d(channels),
    )
    return Residual(body, shortcut, activation=ReLU())


def _stages(
    block: Callable[..., Layer],
    inputs: int,
    widths: Sequence[int],
    depths: Sequence[int],
    shortcut: Shortcut,
    init: Initializer,
) -> dict[str, Layer]:
    """Return layer1, layer2, ...: sequences of blocks. Each stage after the first begins with
    stride 2."""
    stages: dict[str, Layer] = {}
    for number, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
        blocks = []
        for index in range(depth):
            stride = 2 if number > 1 and index == 0 else 1
            changes = stride != 1 or inputs != width
            blocks.append(block(width, stride, shortcut(width, stride) if changes else None, init))
            inputs = width
        stages[f"layer{number}"] = Seq(*blocks)
    return stages


# --- for CIFAR ------------------------------------------------------------------------------------


class ResNet20(Model):
    """The CIFAR network of He, Zhang, Ren and Sun, 2015 ("Deep residual learning", section 4.2), n
    = 3: x (N, 3, 32, 32).

        conv 16 - batch norm - relu
        3 blocks of 16 channels - 3 of 32, the first with stride 2 - 3 of 64, the first with
            stride 2
        global mean - affine 10

    A block is conv - batch norm - relu - conv - batch norm, added to its input, - relu. All
    convolutions are 3x3. If the shape changes, the paper's option "A" (its choice for CIFAR) adds
    every second pixel, with zeros for the new channels: 269,722 parameters, the paper's 0.27
    million. Option "B" adds a 1x1 convolution with batch norm: 272,474. Initialization: He's rule
    over the inputs.

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        option: "A" or "B".
        input_size: H and W, one number or two.
        device: see ``portacnn.resolve``.
        seed: seed of the weights; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: conv1, bn1, layer1.0.conv1 ... layer3.2.bn2, fc; with option "B" also
    layer2.0.downsample.0 and so on.

    Raises:
        ArgumentError, ShapeError: if an argument is out of range or the images are too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        option: str = "A",
        input_size: int | Sequence[int] = 32,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        try:
            one_of("option", option, "A", "B")
        except PortacnnError as error:
            raise error.at("ResNet20")
        shape = image_shape("ResNet20", num_classes, in_channels, input_size)
        shortcut = _subsample if option == "A" else _projection("he")
        super().__init__(
            conv1=_conv(16, 3, 1, "he"),
            bn1=BatchNorm2d(16),
            relu=ReLU(),
            **_stages(basic_block, 16, (16, 32, 64), (3, 3, 3), shortcut, "he"),
            avgpool=GlobalAvgPool(flatten=True),
            fc=Linear(64, num_classes),
        )
        self.build(shape, device=device, dtype=dtype, seed=seed)


# --- for ImageNet ---------------------------------------------------------------------------------


class ResNet(Model):
    """Base of ResNet18 and ResNet50 (He, Zhang, Ren and Sun, 2015, table 1): x (N, 3, 224, 224) ->
    logits (N, 1000).

        conv 64, 7x7, stride 2 - batch norm - relu - 3x3 pool, stride 2
        four stages of blocks, each but the first starting with stride 2
        global mean - affine 1000

    Structure, keys and initialization are torchvision's: if a block changes the shape, its shortcut
    is a 1x1 convolution with batch norm (option B); He's rule over the outputs.

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        input_size: H and W, one number or two.
        device: see ``portacnn.resolve``.
        seed: seed of the weights; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: conv1, bn1, layer1.0.conv1 ..., layer2.0.downsample.0 ..., fc.

    Raises:
        ArgumentError, ShapeError: if an argument is out of range or the images are too small.
    """

    block: ClassVar[Callable[..., Layer]]
    widths: ClassVar[tuple[int, ...]]
    depths: ClassVar[tuple[int, ...]]

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        input_size: int | Sequence[int] = 224,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = image_shape(type(self).__name__, num_classes, in_channels, input_size)
        init = "he_fan_out"
        super().__init__(
            conv1=_conv(64, 7, 2, init),
            bn1=BatchNorm2d(64),
            relu=ReLU(),
            maxpool=MaxPool2d(3, 2, 1),
            **_stages(type(self).block, 64, self.widths, self.depths, _projection(init), init),
            avgpool=GlobalAvgPool(flatten=True),
            fc=Linear(None, num_classes),
        )
        self.build(shape, device=device, dtype=dtype, seed=seed)


class ResNet18(ResNet):
    """2, 2, 2, 2 basic blocks of 64, 128, 256, 512 channels; 11,689,512 parameters. Arguments: see
    ``ResNet``."""

    block, widths, depths = staticmethod(basic_block), (64, 128, 256, 512), (2, 2, 2, 2)


class ResNet50(ResNet):
    """3, 4, 6, 3 bottlenecks of 256, 512, 1024, 2048 channels; 25,557,032 parameters. Arguments:
    see ``ResNet``."""

    block, widths, depths = staticmethod(bottleneck), (256, 512, 1024, 2048), (3, 4, 6, 3)
