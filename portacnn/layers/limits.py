"""Limits for networks read from a file, so that a small file cannot cause large allocations or
hours of computation.

An untrusted file determines the sizes of kernels and samples and the number of layers. Within
``limited`` they are counted when layers are made and planned, before anything is allocated.
Networks built by a program have no limits.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod

from portacnn.errors import ModelFormatError

TAPS = 1 << 17
"""The maximum number of elements of all kernels together. Convolution and pooling process each
element separately; adaptive pooling, resizing, indexing and local response norm process slices,
which count as elements."""
NUMBERS = 1 << 30
"""The maximum number of values of one sample, anywhere in the network."""


class _Left:
    """The remaining limits of the network being built."""

    def __init__(self, layers: int) -> None:
        self.layers, self.taps = layers, TAPS


_left: ContextVar[_Left | None] = ContextVar("portacnn_limits", default=None)


@contextmanager
def limited(layers: int) -> Iterator[None]:
    """Apply the limits within the context: making or planning a larger network raises
    ModelFormatError."""
    token = _left.set(_Left(layers))
    try:
        yield
    finally:
        _left.reset(token)


def count_layer(more: int = 1) -> None:
    """Count ``more`` new layers; a negative number takes them off the count."""
    if (left := _left.get()) is not None:
        left.layers -= more
        if left.layers < 0:
            raise ModelFormatError("it has more layers than a file of its size can describe")


def count_taps(kernel: Sequence[int]) -> None:
    """Count the kernel elements, or slices, of a layer being planned."""
    if (left := _left.get()) is not None:
        left.taps -= prod(kernel) if kernel else 0
        if left.taps < 0:
            raise ModelFormatError(
                f"its kernels and slices have more than {TAPS} elements together (limit reached at "
                f"{'x'.join(map(str, kernel))}); build the network in Python and read the weights "
                "with load_weights"
            )


def count_output(shape: Sequence[int]) -> None:
    """Check the size of one input or output sample of a layer being planned."""
    if _left.get() is not None and prod(shape) > NUMBERS:
        raise ModelFormatError(f"samples {tuple(shape)} have more than {NUMBERS} values")
