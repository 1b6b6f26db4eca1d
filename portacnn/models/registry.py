"""Models by their words: what ``portacnn train --model`` takes, and how to make one for some
images."""

import re
from collections.abc import Sequence
from inspect import signature
from typing import Any

from portacnn.arguments import told
from portacnn.errors import ArgumentError
from portacnn.models.alexnet import AlexNet
from portacnn.models.deep_conv_net import DeepConvNet
from portacnn.models.lenet5 import LeNet5
from portacnn.models.mobilenet import EfficientNetB0, MobileNetV2
from portacnn.models.model import Model
from portacnn.models.resnet import ResNet18, ResNet20, ResNet50
from portacnn.models.simple_conv_net import SimpleConvNet
from portacnn.models.unet import UNet
from portacnn.models.vgg import VGG11, VGG16
from portacnn.runtime import Backend

MODELS: dict[str, type[Model]] = {
    "simple_conv_net": SimpleConvNet,
    "deep_conv_net": DeepConvNet,
    "lenet5": LeNet5,
    "alexnet": AlexNet,
    "vgg11": VGG11,
    "vgg16": VGG16,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "resnet50": ResNet50,
    "mobilenet_v2": MobileNetV2,
    "efficientnet_b0": EfficientNetB0,
    "unet": UNet,
}
"""The words for the networks that build themselves."""

_OF_THE_DATA = ("input_dim", "input_size", "in_channels", "num_classes", "output_size")
_NOT_OPTIONS = {"self", *_OF_THE_DATA, "weight_init_std", "device", "seed", "dtype"}


def model_class(name: Any) -> type[Model]:
    """Return the class of a word; case, dashes and underscores do not matter.

    Raises:
        ArgumentError: if the word is unknown.
    """
    if isinstance(name, str):
        for word, kind in MODELS.items():
            if _plain(name) in (_plain(word), _plain(kind.__name__)):
                return kind
    raise ArgumentError(f"unknown model {told(name)}; known are {', '.join(MODELS)}")


def _plain(word: str) -> str:
    return re.sub(r"[-_ ]", "", word).lower()


def model_options(name: str) -> tuple[str, ...]:
    """Return the names of the options that ``make_model`` takes for a word.

        >>> model_options("vgg11")
        ('batch_norm', 'hidden_size', 'dropout')

    Raises:
        ArgumentError: if the word is unknown.
    """
    parameters = signature(model_class(name).__init__).parameters
    return tuple(option for option in parameters if option not in _NOT_OPTIONS)


def make_model(
    name: str,
    input_shape: Sequence[int],
    num_classes: int,
    *,
    device: str | Backend | None = None,
    seed: int | None = None,
    dtype: str = "float32",
    **options: Any,
) -> Model:
    """Return a built model for images (N, *input_shape) with ``num_classes`` outputs.

        >>> make_model("resnet20", (1, 8, 8), 3, device="cpu", seed=0).output_shape
        (3,)

    Args:
        name: a key of ``MODELS``, or the name of the class, such as "ResNet20".
        input_shape: (C, H, W) of one image.
        options: of the model, see ``model_options``.

    Raises:
        ArgumentError, ShapeError: if the name or an option is unknown or out of range, or the
            images do not fit the model.
    """
    kind = model_class(name)
    taken = model_options(name)
    unknown = [option for option in options if option not in taken]
    if unknown:
        raise ArgumentError(
            f"{kind.__name__} does not take {', '.join(unknown)}; its options are "
            f"{', '.join(taken) or 'none'}"
        )
    if len(input_shape) != 3:
        raise ArgumentError(
            f"{kind.__name__} takes images (C, H, W), got samples of shape {tuple(input_shape)}"
        )
    channels, height, width = input_shape
    if "input_dim" in signature(kind.__init__).parameters:
        options["input_dim"] = (channels, height, width)
    else:
        options["in_channels"] = channels
        options["input_size"] = height if height == width else (height, width)
    made: Any = kind
    return made(num_classes=num_classes, device=device, seed=seed, dtype=dtype, **options)
