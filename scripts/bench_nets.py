"""The networks of the benchmark, and the interface ``Peer`` of a network in one framework.

Needs only NumPy, so that a framework which requires an old NumPy can import it in its own
interpreter.

Notation: N batch, C channels, H/W and OH/OW input and output, K kernel size.
"""

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

SHAPES = {**dict.fromkeys(PLAIN, (1, 28, 28)), "resnet20": (3, 32, 32), "alexnet": (3, 224, 224)}
CLASSES = {**dict.fromkeys(SHAPES, 10), "alexnet": 1000}


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
