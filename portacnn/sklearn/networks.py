"""``small_net``, the estimators' default network."""

from collections.abc import Sequence

from portacnn.layers import Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU
from portacnn.models import Model


def small_net(image_shape: Sequence[int], outputs: int) -> Model:
    """Return an unbuilt network for images of any size: two convolutions, each with a max-pooling
    of the axes that are at least 4 long, and two linear layers.

    >>> net = small_net((1, 1, 20), 3).build((1, 1, 20), device="cpu", seed=0)
    >>> net.output_shape
    (3,)
    """
    layers: dict[str, Layer] = {}
    size = tuple(image_shape[1:])
    for number, filters in enumerate((16, 32), start=1):
        kernel = tuple(min(side, 3) | 1 if side > 1 else 1 for side in size)
        pool = tuple(2 if side >= 4 else 1 for side in size)
        layers[f"conv{number}"] = Conv2d(
            None, filters, kernel, padding=tuple(side // 2 for side in kernel)
        )
        layers[f"relu{number}"] = ReLU()
        if max(pool) > 1:
            layers[f"pool{number}"] = MaxPool2d(pool)
        size = tuple(side // by for side, by in zip(size, pool, strict=True))
    return Model(
        **layers, flatten=Flatten(), fc1=Linear(None, 64), relu3=ReLU(), fc2=Linear(None, outputs)
    )
