"""Networks for mobile devices: depthwise convolutions between 1x1 convolutions."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

from portacnn.arguments import real
from portacnn.errors import PortacnnError
from portacnn.init import uniform
from portacnn.layers import (
    BatchNorm2d,
    Clip,
    Conv2d,
    Dropout,
    GlobalAvgPool,
    Layer,
    Linear,
    Residual,
    SiLU,
    SqueezeExcitation,
    StochasticDepth,
)
from portacnn.layers import Sequential as Seq
from portacnn.models.inputs import image_shape
from portacnn.models.model import Model
from portacnn.runtime import Backend


def rounded(channels: float, divisor: int = 8) -> int:
    """Return the nearest multiple of ``divisor`` that is at least 90 percent of ``channels``."""
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def _unit(
    inputs: int,
    outputs: int,
    kernel: int,
    activation: Layer | None,
    stride: int = 1,
    groups: int = 1,
    eps: float = 1e-5,
) -> Seq:
    """Return a convolution with "same" padding, batch norm and an activation."""
    # torchvision's fan_out counts the outputs of all groups.
    spread = sqrt(2.0 / (outputs * kernel * kernel))
    conv = Conv2d(
        inputs,
        outputs,
        kernel,
        stride,
        kernel // 2,
        groups=groups,
        bias=False,
        weight_init=spread,
    )
    norm = BatchNorm2d(outputs, eps)
    return Seq(conv, norm) if activation is None else Seq(conv, norm, activation)


class MobileNetV2(Model):
    """The network of Sandler, Howard, Zhu, Zhmoginov and Chen, 2018 (table 2): x (N, 3, 224, 224)
    -> logits (N, 1000).

        conv 32, 3x3, stride 2
        17 inverted residuals: 1x1 to 6 times the channels - 3x3 depthwise - 1x1, no activation
        conv 1280, 1x1 - global mean - dropout - affine 1000

    Structure, keys and initialization are torchvision's; 3,504,872 parameters. A batch norm follows
    each convolution; ReLU6 follows each but the last of a block.

        model = MobileNetV2(num_classes=10, input_size=96, seed=0)

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        width: multiplier of all channel numbers, which are rounded to multiples of 8.
        dropout: probability of dropping a unit before the linear layer.
        input_size: H and W, one number or two.
        device: see ``portacnn.resolve``.
        seed: seed of weights and dropout; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: features.0.0 ... features.18.1, classifier.1.

    Raises:
        ArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        dropout: float = 0.2,
        input_size: int | Sequence[int] = 224,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = image_shape("MobileNetV2", num_classes, in_channels, input_size)
        try:
            width = real("width", width, above=0.0)
        except PortacnnError as error:
            raise error.at("MobileNetV2")
        channels = rounded(32 * width)
        features: list[Layer] = [_unit(in_channels, channels, 3, Clip(0.0, 6.0), 2)]
        # expansion, channels, blocks, stride of the first
        for expansion, base, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            outputs = rounded(base * width)
            for index in range(count):
                step = stride if index == 0 else 1
                features.append(_inverted(channels, outputs, step, expansion))
                channels = outputs
        last = rounded(1280 * max(1.0, width))
        features.append(_unit(channels, last, 1, Clip(0.0, 6.0)))
        super().__init__(
            features=Seq(*features),
            avgpool=GlobalAvgPool(flatten=True),
            classifier=Seq(Dropout(dropout), Linear(last, num_classes, weight_init=0.01)),
        )
        self.build(shape, device=device, dtype=dtype, seed=seed)


def _inverted(inputs: int, outputs: int, stride: int, expansion: int) -> Layer:
    """Return an inverted residual block: 1x1 expansion, depthwise convolution, 1x1 projection. It
    has a shortcut if input and output have one shape."""
    wide = inputs * expansion
    parts: list[Layer] = [] if expansion == 1 else [_unit(inputs, wide, 1, Clip(0.0, 6.0))]
    project = _unit(wide, outputs, 1, None)
    parts += [
        _unit(wide, wide, 3, Clip(0.0, 6.0), stride, groups=wide),
        project.children["0"],
        project.children["1"],
    ]
    body = Seq(conv=Seq(*parts))
    return Residual(body) if stride == 1 and inputs == outputs else body


class EfficientNetB0(Model):
    """The network of Tan and Le, 2019 (table 1): x (N, 3, 224, 224) -> logits (N, 1000).

        conv 32, 3x3, stride 2
        16 blocks: 1x1 to 6 times the channels - 3x3 or 5x5 depthwise - squeeze and excitation - 1x1
        conv 1280, 1x1 - global mean - dropout - affine 1000

    Structure, keys and initialization are torchvision's; 5,288,548 parameters. A batch norm follows
    each convolution; SiLU follows each but the last of a block. In training, blocks with a shortcut
    are skipped at random for each image (``StochasticDepth``).

        model = EfficientNetB0(num_classes=10, seed=0)

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        dropout: probability of dropping a unit before the linear layer.
        stochastic_depth: probability of skipping a block at full depth; it grows linearly from 0
            with the depth.
        input_size: H and W, one number or two.
        device: see ``portacnn.resolve``.
        seed: seed of weights and dropout; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: features.0.0 ... features.1.0.block.0.0 ..., classifier.1.

    Raises:
        ArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        dropout: float = 0.2,
        stochastic_depth: float = 0.2,
        input_size: int | Sequence[int] = 224,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = image_shape("EfficientNetB0", num_classes, in_channels, input_size)
        try:
            real("stochastic_depth", stochastic_depth, least=0.0, most=1.0)
        except PortacnnError as error:
            raise error.at("EfficientNetB0")
        channels, number = 32, 0
        features: list[Layer] = [_unit(in_channels, channels, 3, SiLU(), 2)]
        # expansion, kernel, stride of the first, channels, blocks
        stages = (
            (1, 3, 1, 16, 1),
            (6, 3, 2, 24, 2),
            (6, 5, 2, 40, 2),
            (6, 3, 2, 80, 3),
            (6, 5, 1, 112, 3),
            (6, 5, 2, 192, 4),
            (6, 3, 1, 320, 1),
        )
        total = sum(stage[-1] for stage in stages)
        for expansion, kernel, stride, outputs, count in stages:
            blocks = []
            for index in range(count):
                skipped = stochastic_depth * number / total
                step = stride if index == 0 else 1
                blocks.append(_mbconv(channels, outputs, kernel, step, expansion, skipped))
                channels, number = outputs, number + 1
            features.append(Seq(*blocks))
        features.append(_unit(channels, 1280, 1, SiLU()))
        spread = uniform(1.0 / sqrt(num_classes))
        super().__init__(
            features=Seq(*features),
            avgpool=GlobalAvgPool(flatten=True),
            classifier=Seq(Dropout(dropout), Linear(1280, num_classes, weight_init=spread)),
        )
        self.build(shape, device=device, dtype=dtype, seed=seed)


def _mbconv(
    inputs: int, outputs: int, kernel: int, stride: int, expansion: int, skipped: float
) -> Layer:
    """Return an inverted residual block with squeeze and excitation, which squeezes to a quarter of
    the input channels."""
    wide = rounded(inputs * expansion)
    squeezed = max(1, inputs // 4)
    parts: list[Layer] = [] if wide == inputs else [_unit(inputs, wide, 1, SiLU())]
    parts += [
        _unit(wide, wide, kernel, SiLU(), stride, groups=wide),
        SqueezeExcitation(wide, squeezed, SiLU(), weight_init="he_fan_out"),
        _unit(wide, outputs, 1, None),
    ]
    body: dict[str, Any] = {"block": Seq(*parts)}
    if stride > 1 or inputs != outputs:
        return Seq(**body)
    return Residual(Seq(**body, stochastic_depth=StochasticDepth(skipped)))
