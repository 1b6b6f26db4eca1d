"""The VGG networks: stacks of 3x3 convolutions and 2x2 pools."""

from collections.abc import Sequence
from typing import ClassVar

from portacnn.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
)
from portacnn.models.inputs import image_shape
from portacnn.models.model import Model
from portacnn.runtime import Backend


class VGG(Model):
    """Base of VGG11 and VGG16 (Simonyan and Zisserman, 2014): x (N, 3, 224, 224) -> logits (N,
    1000).

        stages of 3x3 convolutions with ReLU, each ending in a 2x2 pool
        mean pool to 7x7 - affine 4096 - relu - dropout - affine 4096 - relu - dropout - affine 1000

    The mean pool does not change the 7x7 maps of 224 pixels and allows other sizes, as in
    torchvision. Keys and initialization are also torchvision's (He's rule over the outputs; normal
    with std 0.01 for linear layers; biases 0).

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        batch_norm: add a batch norm between each convolution and its ReLU (not in the paper).
        input_size: H and W, one number or two, at least 32.
        hidden_size: units of the hidden linear layers.
        dropout: probability of dropping a unit.
        device: see ``portacnn.resolve``.
        seed: seed of weights and dropout; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: features.0.weight ..., classifier.0.weight, classifier.3.weight,
    classifier.6.weight ...

    Raises:
        ArgumentError, ShapeError: if an argument is out of range or the images are too small.
    """

    widths: ClassVar[tuple[tuple[int, ...], ...]]
    """The channels of each stage's convolutions."""

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        batch_norm: bool = False,
        input_size: int | Sequence[int] = 224,
        hidden_size: int = 4096,
        dropout: float = 0.5,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = image_shape(type(self).__name__, num_classes, in_channels, input_size)

        def affine(units: int) -> Linear:
            return Linear(None, units, weight_init=0.01, bias_init="zeros")

        super().__init__(
            features=Sequential(*self._features(batch_norm)),
            avgpool=AdaptiveAvgPool2d(7),
            flatten=Flatten(),
            classifier=Sequential(
                affine(hidden_size),
                ReLU(),
                Dropout(dropout),
                affine(hidden_size),
                ReLU(),
                Dropout(dropout),
                affine(num_classes),
            ),
        )
        self.build(shape, device=device, dtype=dtype, seed=seed)

    def _features(self, batch_norm: bool) -> list[Layer]:
        layers: list[Layer] = []
        for stage in self.widths:
            for channels in stage:
                layers.append(
                    Conv2d(
                        None, channels, 3, padding=1, weight_init="he_fan_out", bias_init="zeros"
                    )
                )
                layers += [BatchNorm2d(channels), ReLU()] if batch_norm else [ReLU()]
            layers.append(MaxPool2d(2))
        return layers


class VGG11(VGG):
    """Configuration A: 64 - 128 - 256 256 - 512 512 - 512 512; 132,863,336 parameters. Arguments:
    see ``VGG``."""

    widths = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class VGG16(VGG):
    """Configuration D: 64 64 - 128 128 - 256 x 3 - 512 x 3 - 512 x 3; 138,357,544 parameters.
    Arguments: see ``VGG``."""

    widths = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
