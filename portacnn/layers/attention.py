"""Attention layers: they multiply their input by weights computed from it."""

from portacnn.arguments import whole
from portacnn.errors import PortacnnError
from portacnn.init import Initializer
from portacnn.layers.activation import ReLU, Sigmoid
from portacnn.layers.base import Layer
from portacnn.layers.conv import Conv2d
from portacnn.layers.graph import INPUT, Graph
from portacnn.layers.join import Arithmetic
from portacnn.layers.pool import GlobalAvgPool

__all__ = ["SqueezeExcitation"]


class SqueezeExcitation(Graph):
    """Weight each channel by a factor computed from all channel means: x (N, C, H, W) -> x * s,
    with s (N, C, 1, 1) in 0..1, as torchvision.ops.SqueezeExcitation (Hu et al., 2018).

        s = scale_activation(fc2(activation(fc1(mean of each channel))))

        Sequential(Conv2d(3, 64, 3), SqueezeExcitation(64, 16))

    Args:
        input_channels: C.
        squeeze_channels: outputs of fc1.
        activation: a layer; default ReLU().
        scale_activation: a layer; default Sigmoid().
        weight_init: of fc1 and fc2.

    Children: ``fc1``, ``fc2``, 1x1 convolutions.

    Raises:
        ArgumentError: a number of channels below 1.
        ShapeError: when the network is built, if the input does not have input_channels channels.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: Layer | None = None,
        scale_activation: Layer | None = None,
        weight_init: Initializer = "default",
    ) -> None:
        try:
            whole("input_channels", input_channels, 1)
            whole("squeeze_channels", squeeze_channels, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        super().__init__(
            ("avgpool", GlobalAvgPool(), [INPUT]),
            (
                "fc1",
                Conv2d(input_channels, squeeze_channels, 1, weight_init=weight_init),
                ["avgpool"],
            ),
            ("activation", activation or ReLU(), ["fc1"]),
            (
                "fc2",
                Conv2d(squeeze_channels, input_channels, 1, weight_init=weight_init),
                ["activation"],
            ),
            ("scale_activation", scale_activation or Sigmoid(), ["fc2"]),
            ("scale", Arithmetic("multiply"), [INPUT, "scale_activation"]),
        )
