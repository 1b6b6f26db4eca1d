"""UNet: semantic segmentation."""

from collections.abc import Sequence

from portacnn.arguments import one_of, whole
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers import (
    BatchNorm2d,
    Concat,
    Conv2d,
    ConvTranspose2d,
    Layer,
    MaxPool2d,
    ReLU,
    Upsample,
)
from portacnn.layers.base import Shape
from portacnn.layers.graph import INPUT
from portacnn.models.graph_model import GraphModel
from portacnn.models.inputs import image_shape
from portacnn.runtime import Backend

Nodes = list[tuple[str, Layer, list[str]]]


class UNet(GraphModel):
    """The network of Ronneberger, Fischer and Brox, 2015, padded and with batch norm: x (N, C, H,
    W) -> logits (N, classes, H, W).

        inc:            two 3x3 convolutions of ``width`` channels
        down1 ...:      2x2 pool - two 3x3 convolutions of twice the channels
        up1 ...:        upsampling by 2 - concatenation with the encoder's output of that size -
                        two 3x3 convolutions of half the channels
        outc:           1x1 convolution to the classes

    Batch norm and ReLU follow each 3x3 convolution. Structure and keys are those of the common
    PyTorch implementation (github.com/milesial/Pytorch-UNet), whose weights load: 31,037,698
    parameters for 3 channels and 2 classes. It is fully convolutional: H and W of the images may be
    any multiples of 2**depth, not only ``input_size``.

        model = UNet(1, 2, depth=3, width=16, input_size=64, seed=0)
        model.predict(np.zeros((1, 1, 96, 128), "float32")).shape  # (1, 2, 96, 128)

    Args:
        in_channels: channels of the images, and ``num_classes``: number of classes.
        depth: number of poolings.
        width: channels at full resolution.
        up: "transpose" doubles the size with a transposed convolution; "bilinear" with
            interpolation, which has no parameters, and half the channels at the lowest resolution.
        input_size: H and W, one number or two.
        device: see ``portacnn.resolve``.
        seed: seed of the weights; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: inc.double_conv.0 ..., down1.maxpool_conv.1.double_conv.0 ..., up1.up,
    up1.conv.double_conv.0 ..., outc.conv.

    Raises:
        ArgumentError: an argument is out of range.
        ShapeError: H or W is not a multiple of 2**depth.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 2,
        *,
        depth: int = 4,
        width: int = 64,
        up: str = "transpose",
        input_size: int | Sequence[int] = 256,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = image_shape("UNet", num_classes, in_channels, input_size)
        try:
            self.depth = whole("depth", depth, 1, 16)
            whole("width", width, 2)
            one_of("up", up, "transpose", "bilinear")
            if up == "bilinear" and width % 2:
                raise ShapeError(f'width must be even with up="bilinear", got {width}')
        except PortacnnError as error:
            raise error.at("UNet")
        nodes: Nodes = []

        def add(name: str, layer: Layer, *inputs: str) -> str:
            nodes.append((name, layer, list(inputs)))
            return name

        def convolutions(name: str, x: str, channels: int, middle: int, outputs: int) -> str:
            for index, (before, after) in enumerate(((channels, middle), (middle, outputs))):
                at = f"{name}.double_conv."
                conv = Conv2d(before, after, 3, padding=1, bias=False)
                x = add(f"{at}{3 * index}", conv, x)
                x = add(f"{at}{3 * index + 1}", BatchNorm2d(after), x)
                x = add(f"{at}{3 * index + 2}", ReLU(), x)
            return x

        share = 2 if up == "bilinear" else 1
        widths = [width * 2**level for level in range(depth + 1)]
        widths[-1] //= share
        x = convolutions("inc", INPUT, in_channels, width, width)
        ways = [x]
        for level in range(1, depth + 1):
            name = f"down{level}.maxpool_conv"
            x = add(f"{name}.0", MaxPool2d(2), x)
            channels, outputs = widths[level - 1], widths[level]
            x = convolutions(f"{name}.1", x, channels, outputs, outputs)
            ways.append(x)
        for number in range(1, depth + 1):
            level = depth - number  # of the output
            channels = width * 2 ** (level + 1)  # of the concatenation
            outputs = width * 2**level // (share if level else 1)
            if up == "bilinear":
                doubled: Layer = Upsample(None, 2, "bilinear", align_corners=True)
            else:
                doubled = ConvTranspose2d(channels, channels // 2, 2, 2)
            x = add(f"up{number}.up", doubled, x)
            x = add(f"up{number}.concat", Concat(), ways[level], x)
            middle = channels // 2 if up == "bilinear" else outputs
            x = convolutions(f"up{number}.conv", x, channels, middle, outputs)
        add("outc.conv", Conv2d(width, num_classes, 1), x)
        super().__init__(*nodes)
        self.build(shape, device=device, dtype=dtype, seed=seed)

    def infer(self, shape: Shape) -> Shape:
        step = 2**self.depth
        if len(shape) != 3 or shape[1] % step or shape[2] % step:
            raise ShapeError(
                f"expected samples (C, H, W) with H and W multiples of {step} (2**depth), got "
                f"{shape}; crop or pad the images"
            )
        return super().infer(shape)
