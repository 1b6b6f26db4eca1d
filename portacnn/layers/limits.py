"""Limits for networks that a file describes, so that a small file becomes neither a large heap nor
hours of work.

A stranger's file says how large kernels and samples are, and how many layers a builder makes.
Within ``limited`` all of it is counted as layers are made and planned, and nothing is allocated
before. Networks that a program builds itself have no limits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

from portacnn.errors import ModelFormatError

TAPS = 1 << 17
"""Elements of all kernels together: convolution and pooling take each of them separately."""
NUMBERS = 1 << 30
"""Values of one sample, anywhere in the network."""


class _Left:
    """What the network that is being built may still have."""

    def __init__(self, layers: int) -> None:
        self.layers, self.taps = layers, TAPS


_left: ContextVar[_Left | None] = ContextVar("portacnn_limits", default=None)


@contextmanager
def limited(layers: int) -> Iterator[None]:
    """Within it, a network that exceeds the limits raises ModelFormatError when it is made or
    planned."""
    token = _left.set(_Left(layers))
    try:
        yield
    finally:
        _left.reset(token)


def count_layer(more: int = 1) -> None:
    """Count ``more`` layers that are made; a negative number allows as many more."""
    if (left := _left.get()) is not None:
        left.layers -= more
        if left.layers < 0:
            raise ModelFormatError("it asks for more layers than a file of its size describes")


def count_taps(kernel: Sequence[int]) -> None:
    """Count the kernel of a layer that is planned."""
    if (left := _left.get()) is not None:
        left.taps -= prod(kernel) if kernel else 0
        if left.taps < 0:
            raise ModelFormatError(
                f"its kernels have more than {TAPS} cells together, this one is "
                f"{'x'.join(map(str, kernel))}; "
                "build such a network yourself, and give it the weights with load_weights"
            )


def count_output(shape: Sequence[int]) -> None:
    """Check the shape of a sample that a planned layer takes or returns."""
    if _left.get() is not None and prod(shape) > NUMBERS:
        raise ModelFormatError(f"samples {tuple(shape)} have more than {NUMBERS} values")
