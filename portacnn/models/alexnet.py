"""AlexNet: the network that won ImageNet's 2012 challenge."""

from collections.abc import Sequence

from portacnn.layers import Conv2d, Dropout, Flatten, Linear, LocalResponseNorm, MaxPool2d, ReLU
from portacnn.models.inputs import image_shape
from portacnn.models.model import Model
from portacnn.runtime import Backend


class AlexNet(Model):
    """The network of Krizhevsky, Sutskever and Hinton, 2012, for images (N, 3, 224, 224);
    60,965,224 parameters.

        conv 96, 11x11, stride 4 - relu - response norm - pool
        conv 256, 5x5, 2 groups  - relu - response norm - pool
        conv 384, 3x3            - relu
        conv 384, 3x3, 2 groups  - relu
        conv 256, 3x3, 2 groups  - relu - pool
        affine 4096 - relu - dropout - affine 4096 - relu - dropout - affine 1000

    Pools are 3x3 with stride 2. The groups are the paper's two GPUs: each half of the maps is
    connected to half of the previous maps. Response norm is the paper's, over 5 channels with k =
    2, alpha = 1e-4 (5e-4 for ``LocalResponseNorm``, which divides it by 5) and beta = 0.75. Initial
    weights are normal with std 0.01. Initial biases are 1 in the second, fourth and fifth
    convolution and the hidden linear layers, 0 elsewhere.

    With 224 pixels the paper's first convolution would make 54 pixels, not its 55. It pads by 2
    here, as torchvision's does, and also takes images of 227.

    Args:
        num_classes: number of classes, and ``in_channels``: channels of the images.
        input_size: H and W, one number or two, at least 63.
        hidden_size: units of the hidden linear layers.
        dropout: probability of dropping a unit.
        device: see ``portacnn.resolve``.
        seed: seed of weights and dropout; None draws one.
        dtype: "float32" or "float64".

    Parameters, by path: conv1 ... conv5, fc6, fc7, fc8, each with weight and bias.

    Raises:
        ArgumentError, ShapeError: if an argument is out of range or the images are too small.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        input_size: int | Sequence[int] = 224,
        hidden_size: int = 4096,
        dropout: float = 0.5,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        shape = image_shape("AlexNet", num_classes, in_channels, input_size)

        def conv(
            channels: int, kernel: int, stride: int, padding: int, groups: int, bias: str
        ) -> Conv2d:
            return Conv2d(
                None,
                channels,
                kernel,
                stride,
                padding,
                groups=groups,
                weight_init=0.01,
                bias_init=bias,
            )

        def norm() -> LocalResponseNorm:
            return LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

        super().__init__(
            conv1=conv(96, 11, 4, 2, 1, "zeros"),
            relu1=ReLU(),
            norm1=norm(),
            pool1=MaxPool2d(3, 2),
            conv2=conv(256, 5, 1, 2, 2, "ones"),
            relu2=ReLU(),
            norm2=norm(),
            pool2=MaxPool2d(3, 2),
            conv3=conv(384, 3, 1, 1, 1, "zeros"),
            relu3=ReLU(),
            conv4=conv(384, 3, 1, 1, 2, "ones"),
            relu4=ReLU(),
            conv5=conv(256, 3, 1, 1, 2, "ones"),
            relu5=ReLU(),
            pool5=MaxPool2d(3, 2),
            flatten=Flatten(),
            fc6=Linear(None, hidden_size, weight_init=0.01, bias_init="ones"),
            relu6=ReLU(),
            dropout6=Dropout(dropout),
            fc7=Linear(None, hidden_size, weight_init=0.01, bias_init="ones"),
            relu7=ReLU(),
            dropout7=Dropout(dropout),
            fc8=Linear(None, num_classes, weight_init=0.01, bias_init="zeros"),
        )
        self.build(shape, device=device, dtype=dtype, seed=seed)
