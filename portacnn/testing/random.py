"""Random sizes, geometries and values for the examples.

Every choice is made by ``Random.whole``. A test may override it, so that for instance hypothesis
chooses (and makes a failing example smaller); values come from NumPy's generator.

Notation: N batch, S the spatial axes.
"""

from math import prod
from typing import Any, Literal

import numpy as np

from portacnn.errors import PortacnnError
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows

Scale = Literal["small", "medium", "large"]


class Random:
    """Random arguments.

    Args:
        seed: of the values, and of the choices.
        scale: how large the shapes become. "small" is for oracles that loop in Python and for the
            emulator of CUDA; "large" needs more than one block of threads on a GPU.
    """

    def __init__(self, seed: int, scale: Scale = "medium") -> None:
        self.values = np.random.default_rng(seed)
        self.choices = np.random.default_rng([seed, 1])
        self.scale = scale

    def whole(self, low: int, high: int) -> int:
        """An integer, low <= i <= high."""
        return int(self.choices.integers(low, high + 1))

    def of(self, *values: Any) -> Any:
        return values[self.whole(0, len(values) - 1)]

    def upto(self, small: int, medium: int) -> int:
        """From 1 to the limit of the scale."""
        return self.whole(1, small if self.scale == "small" else medium)

    def batch(self) -> int:
        """Of one vector and of several, whole and not."""
        if self.scale == "small":
            return int(self.of(1, 2, 3, 4, 5, 8, 17, 33))
        more = (100, 257) if self.scale == "large" else ()
        return int(self.of(1, 2, 8, 15, 16, 17, 31, 32, 33, *more, self.whole(1, 40)))

    def size(self, least: int = 0, most: int = 3) -> tuple[int, ...]:
        """S. Of three axes each is short."""
        axes = self.whole(least, most)
        return tuple(self.upto(5, 13 if axes < 3 else 7) for _ in range(axes))

    # --- values -----------------------------------------------------------------------------------

    def numbers(self, *shape: int) -> Any:
        return np.asarray(self.values.standard_normal(shape))

    def positive(self, *shape: int) -> Any:
        """From 0.5 to 2."""
        return np.asarray(self.values.uniform(0.5, 2.0, shape))

    def eighths(self, *shape: int) -> Any:
        """Multiples of 1/8 from -1 to 1: the products of two are multiples of 1/64, and 10^5 of
        them add up exactly in float32.

        For an op that decides something (ReLU, the largest in a window): then float32 and float64
        decide alike, ties included.
        """
        return np.asarray(self.values.integers(-8, 9, shape) / 8)

    def integers(self, low: int, high: int, *shape: int) -> Any:
        """low <= i < high, in int64."""
        return np.asarray(self.values.integers(low, high, shape))

    # --- geometries -------------------------------------------------------------------------------

    def windows(self, axes: int | None = None, most: int = 12) -> Windows:
        """The geometry of a convolution, of so many axes (None: of two, sometimes of one). The
        input is at most ``most`` larger than it must be."""
        axes = self.of(2, 2, 2, 1) if axes is None else axes
        limit = min(most, 9 if self.scale == "small" else 12) if axes < 3 else 3

        def each(low: int, high: int) -> tuple[int, ...]:
            return tuple(self.whole(low, high) for _ in range(axes))

        kernel, stride = each(1, 5 if axes < 3 else 3), each(1, 3)
        dilation = each(1, 3 if axes < 3 else 2)
        pads = tuple(zip(each(0, 3), each(0, 3), strict=True))
        least = (
            max(1, d * (k - 1) + 1 - sum(p)) for k, d, p in zip(kernel, dilation, pads, strict=True)
        )
        size = tuple(n + more for n, more in zip(least, each(0, limit), strict=True))
        return Windows.of(size, kernel, stride, pads, dilation)

    def pooling(self, size: tuple[int, ...], dilated: bool = False) -> Windows:
        """Windows that each see an input: side by side, or overlapping, apart and padded."""
        while True:
            kernel = tuple(self.whole(1, min(3, n)) for n in size)
            if self.of(True, False):
                return pool_windows(size, kernel, None, 0, 1, self.of(True, False))
            stride = tuple(self.whole(1, 4) for _ in size)
            padding = self.of(0, 1, tuple((self.whole(0, 1), self.whole(0, 1)) for _ in size))
            dilation = self.whole(1, 2) if dilated else 1
            try:
                return pool_windows(size, kernel, stride, padding, dilation, self.of(True, False))
            except PortacnnError:  # a window would see padding alone
                continue


def count(windows: Windows) -> int:
    """The taps of a kernel."""
    return prod(windows.kernel)
