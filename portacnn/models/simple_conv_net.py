"""The tutorials' network: one convolution, one pooling, two linear layers."""

from collections.abc import Mapping, Sequence
from typing import Any

from portacnn.arguments import either
from portacnn.errors import ArgumentError
from portacnn.init import Initializer
from portacnn.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU
from portacnn.models.model import Model
from portacnn.runtime import Backend

_CONV = {"filter_num": 30, "filter_size": 5, "pad": 0, "stride": 1}


class SimpleConvNet(Model):
    """conv - relu - pool - linear - relu - linear, for images (N, *input_dim).

        >>> net = SimpleConvNet(num_classes=3, weight_init="he", device="cpu", seed=0)
        >>> net.input_shape, net.output_shape
        ((1, 28, 28), (3,))

    The network of "Deep Learning from Scratch" (Saitoh), chapter 7. ``forward`` returns logits (N,
    num_classes): softmax is part of the loss. If the pooling's 2x2 windows do not divide the
    convolution's output, its last row and column are dropped.

    Args:
        input_dim: (C, H, W) of one image.
        conv_param: ``filter_num``, ``filter_size``, ``pad``, ``stride``; the defaults are 30, 5, 0,
            1.
        hidden_size: units of the hidden linear layer.
        num_classes: number of classes; default 10.
        weight_init: a standard deviation (default 0.01), "he"/"relu", "xavier"/"sigmoid", or any
            initializer of ``portacnn.init``. Biases are initialized with 0.
        output_size, weight_init_std: the book's names of ``num_classes`` and ``weight_init``. Pass
            only one of each pair.
        in_channels: replaces C of ``input_dim``.
        device: see ``portacnn.resolve``.
        seed: seed of the weights; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: conv1.weight (filter_num, C, filter_size, filter_size), fc1.weight
    (hidden_size, features), fc2.weight (num_classes, hidden_size), and a bias for each.

    Raises:
        ArgumentError, ShapeError: if an argument is unknown or out of range, or the images are too
            small.
    """

    def __init__(
        self,
        input_dim: Sequence[int] = (1, 28, 28),
        conv_param: Mapping[str, Any] | None = None,
        hidden_size: int = 100,
        output_size: int | None = None,
        weight_init_std: Initializer | None = None,
        *,
        num_classes: int | None = None,
        weight_init: Initializer | None = None,
        in_channels: int | None = None,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        unknown = set(conv_param or {}) - set(_CONV)
        if unknown:
            raise ArgumentError(
                f"conv_param takes {', '.join(_CONV)}; got {', '.join(sorted(unknown))}",
                "SimpleConvNet",
            )
        num_classes = either(10, num_classes=num_classes, output_size=output_size)
        weight_init = either(0.01, weight_init=weight_init, weight_init_std=weight_init_std)
        input_dim = input_dim if in_channels is None else (in_channels, *input_dim[1:])
        conv = {**_CONV, **(conv_param or {})}
        init: dict[str, Any] = {"weight_init": weight_init, "bias_init": "zeros"}
        super().__init__(
            conv1=Conv2d(
                None, conv["filter_num"], conv["filter_size"], conv["stride"], conv["pad"], **init
            ),
            relu1=ReLU(),
            pool1=MaxPool2d(2),
            flatten=Flatten(),
            fc1=Linear(None, hidden_size, **init),
            relu2=ReLU(),
            fc2=Linear(None, num_classes, **init),
        )
        self.build(input_dim, device=device, dtype=dtype, seed=seed)
