"""The networks of the benchmark, and the interface ``Peer`` of a network in one framework.

Needs only NumPy, so that a framework which requires an old NumPy can import it in its own
interpreter.

Notation: N batch, C channels, H/W and OH/OW input and output, K kernel size.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 0.01


# --- the nets -------------------------------------------------------------------------------------


class Conv(NamedTuple):
    """A convolution with stride 1, followed by ReLU."""

    inputs: int
    outputs: int
    kernel: int
    padding: int


class Pool(NamedTuple):
    """2x2 max pooling."""


class Linear(NamedTuple):
    """A linear layer, followed by ReLU except after the last."""

    inputs: int
    outputs: int


PLAIN: dict[str, list[Conv | Pool | Linear]] = {
    "simple": [Conv(1, 30, 5, 0), Pool(), Linear(4320, 100), Linear(100, 10)],
    "lenet": [
        Conv(1, 6, 5, 2),
        Pool(),
        Conv(6, 16, 5, 0),
        Pool(),
        Linear(400, 120),
        Linear(120, 84),
        Linear(84, 10),
    ],
    "deep": [
        *(Conv(1, 16, 3, 1), Conv(16, 16, 3, 1), Pool()),
        *(Conv(16, 32, 3, 1), Conv(32, 32, 3, 1), Pool()),
        *(Conv(32, 64, 3, 1), Conv(64, 64, 3, 1), Pool()),
        *(Linear(576, 50), Linear(50, 10)),
    ],
}
"""The networks without branches, as lists of layers."""

IMAGENET = ("alexnet", "vgg11", "resnet18", "resnet50", "mobilenetv2")

SHAPES = {
    **dict.fromkeys(PLAIN, (1, 28, 28)),
    "resnet20": (3, 32, 32),
    **dict.fromkeys(IMAGENET, (3, 224, 224)),
    "unet": (3, 128, 128),
}
"""The shape of an image of each net, by default."""

CLASSES = {**dict.fromkeys(SHAPES, 10), **dict.fromkeys(IMAGENET, 1000), "unet": 2}
FIXED = (*PLAIN, "alexnet")
"""The nets that have one image size only. Of UNet's, 16 must be a divisor."""


def images(
    net: str, count: int, seed: int = 0, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return random float32 images (N, C, H, W) of the net's size or H = W = ``size``, and their
    labels: (N,), or (N, H, W) for UNet.
    """
    rng = np.random.default_rng(seed)
    channels, *own = SHAPES[net]
    pixels = (size, size) if size else tuple(own)
    x = rng.random((count, channels, *pixels), dtype=np.float32)
    return x, rng.integers(0, CLASSES[net], (count, *pixels) if net == "unet" else count)


def epoch_sets(task: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return training and test set of an epoch: from the folder, else random images."""
    count = task["images"]
    if task["data"] is None:
        return [images(task["net"], count), images(task["net"], max(count // 6, 1), seed=1)]
    stored = [
        np.load(Path(task["data"]) / f"{name}.npy")
        for name in ("x_train", "t_train", "x_test", "t_test")
    ]
    x_train, t_train, x_test, t_test = stored
    return [
        ((x[:n] / np.float32(255)).astype(np.float32), t[:n])
        for x, t, n in ((x_train, t_train, count), (x_test, t_test, max(count // 6, 1)))
    ]


# --- the interface --------------------------------------------------------------------------------


class Peer:
    """A network in one framework. ``x`` (N, C, H, W) and ``t`` (N,) are results of ``put``."""

    parameters = 0
    """The number of trainable parameters."""

    def put(self, array: np.ndarray) -> Any:
        """Convert an array to the framework's: float32 images, int64 labels or indices."""
        return array

    def begin(self, training: bool) -> None:
        """Prepare for training steps or for predictions."""

    def step(self, x: Any, t: Any) -> Any:
        """Run one training step and return the loss, in the framework's form."""
        raise NotImplementedError

    def predict(self, x: Any) -> Any:
        """Return the logits (N, classes)."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until the device has finished its work."""

    def device_bytes(self) -> int | None:
        """Return the peak memory of the device, or None if it uses host memory."""
        return None

    def correct(self, x: Any, t: Any) -> Any:
        """Return the number of images classified as t."""
        return (self.predict(x).argmax(1) == t).sum()
