"""The tutorials' deep network: six convolutions, and dropout."""

from collections.abc import Sequence
from typing import Any

from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Layer, Linear, MaxPool2d, ReLU
from portacnn.models.inputs import image_shape
from portacnn.models.model import Model
from portacnn.runtime import Backend


class DeepConvNet(Model):
    """The network of "Deep Learning from Scratch" (Saitoh), chapter 8, for MNIST's images (N, 1,
    28, 28).

        conv 16 - relu - conv 16 - relu - pool
        conv 32 - relu - conv 32 - relu - pool
        conv 64 - relu - conv 64 - relu - pool
        affine 50 - relu - dropout - affine 10 - dropout - softmax

    Kernels are 3x3 with padding 1, except 2 in the fourth convolution, so sizes are 28 -> 14 -> 8
    -> 4. Pools are 2x2. Weights are initialized as in He et al. (2015), biases with 0. As in the
    book, dropout also follows the last linear layer. ``forward`` returns logits: softmax is part of
    the loss.

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        input_size: H and W, one number or two.
        hidden_size: units of the hidden linear layer.
        dropout: probability of dropping a unit, for both dropout layers.
        batch_norm: add a batch norm between each convolution and its ReLU (not in the book).
        device: see ``portacnn.resolve``.
        seed: seed of weights and dropout; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: conv1 ... conv6, fc1, fc2, each with weight and bias; bn1 ... bn6 with
    ``batch_norm``.

    Raises:
        ArgumentError, ShapeError: if an argument is out of range or the images are too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        *,
        input_size: int | Sequence[int] = 28,
        hidden_size: int = 50,
        dropout: float = 0.5,
        batch_norm: bool = False,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = image_shape("DeepConvNet", num_classes, in_channels, input_size)
        init: dict[str, Any] = {"weight_init": "he", "bias_init": "zeros"}
        layers: dict[str, Layer] = {}
        for number, (channels, padding) in enumerate(
            ((16, 1), (16, 1), (32, 1), (32, 2), (64, 1), (64, 1)), 1
        ):
            layers[f"conv{number}"] = Conv2d(None, channels, 3, padding=padding, **init)
            if batch_norm:
                layers[f"bn{number}"] = BatchNorm2d(channels)
            layers[f"relu{number}"] = ReLU()
            if number % 2 == 0:
                layers[f"pool{number // 2}"] = MaxPool2d(2)
        super().__init__(
            **layers,
            flatten=Flatten(),
            fc1=Linear(None, hidden_size, **init),
            relu7=ReLU(),
            dropout1=Dropout(dropout),
            fc2=Linear(None, num_classes, **init),
            dropout2=Dropout(dropout),
        )
        self.build(shape, device=device, dtype=dtype, seed=seed)
