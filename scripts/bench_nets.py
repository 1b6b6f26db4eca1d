"""What the benchmark's contenders are given: the nets, and the form of a ``Peer``, which has one of
them in one framework.

Needs NumPy alone, so that a framework which asks for an old one can run it in an interpreter of its
own.

Notation: N batch, C channels, H/W and OH/OW input and output, K kernel size.
"""

from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE = 0.01


# --- the nets -------------------------------------------------------------------------------------


class Conv(NamedTuple):
    """A convolution with stride 1, and ReLU."""

    inputs: int
    outputs: int
    kernel: int
    padding: int


class Pool(NamedTuple):
    """The maximum of 2x2 pixels."""


class Linear(NamedTuple):
    """An affine layer, and ReLU but after the last."""

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
"""The nets without branches: a list says all there is to them."""

SHAPES = {**dict.fromkeys(PLAIN, (1, 28, 28)), "resnet20": (3, 32, 32), "alexnet": (3, 224, 224)}
CLASSES = {**dict.fromkeys(SHAPES, 10), "alexnet": 1000}


# --- a contender ----------------------------------------------------------------------------------


class Peer:
    """One net of one framework. ``x`` (N, C, H, W) and ``t`` (N,) are what ``put`` gives."""

    parameters = 0
    """How many numbers it learns."""

    def put(self, array: np.ndarray) -> Any:
        """The array as the framework takes it: float32 images, int64 labels or places."""
        return array

    def begin(self, training: bool) -> None:
        """Before training steps, and before predictions."""

    def step(self, x: Any, t: Any) -> Any:
        """One training step; gives the loss, in whatever form it has."""
        raise NotImplementedError

    def predict(self, x: Any) -> Any:
        """The logits (N, classes)."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""

    def device_bytes(self) -> int | None:
        """The most memory that the device has lent so far; None where that is the host's."""
        return None

    def correct(self, x: Any, t: Any) -> Any:
        """How many images are classified as t."""
        return (self.predict(x).argmax(1) == t).sum()
