"""Max pooling, with the place of each maximum, in a form that XLA fuses: no transposes, and a
padding for each tap of the window.

XLA has windows of its own (``reduce_window``, ``select_and_scatter``), but they do not say which of
equal maxima or of several NaN is chosen, and on the CPU the gradient is a loop over all windows.

Notation: x (N, C, *S), y (N, C, *OUT).
"""

from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portacnn.backends.jax.arrays import JaxArray
from portacnn.backends.jax.compiled import compiled
from portacnn.backends.jax.conv import padding
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

_MOST_TAPS = 64  # of a kernel; each is a part of the program


def _offsets(windows: Windows) -> list[tuple[int, ...]]:
    """Return the place of each tap in the padded input, in order."""
    ranges = [range(0, k * d, d) for k, d in zip(windows.kernel, windows.dilation, strict=True)]
    return list(product(*ranges))


def _inside(windows: Windows, offset: tuple[int, ...]) -> Any:
    """Return which outputs (*OUT) read an input at a tap, and no padding: True if all do."""
    if windows.covers:
        return True
    inside = np.ones((), dtype=bool)
    for axis, (o, s, n, start, at) in enumerate(
        zip(windows.out, windows.stride, windows.size, windows.start, offset, strict=True)
    ):
        cells = start + at + s * np.arange(o)
        here = (cells >= 0) & (cells < n)
        inside = inside & here.reshape([-1 if i == axis else 1 for i in range(len(windows.out))])
    return inside


@compiled
def max_pool(x: Any, windows: Windows, *, keep: bool) -> Any:
    if prod(windows.kernel) > _MOST_TAPS or 0 in x.shape:
        return NotImplemented
    value = x.held
    lowest = np.array(-np.inf, dtype=value.dtype)
    none = (0, 0, 0)
    padded = jax.lax.pad(value, lowest, [none, none, *((*pair, 0) for pair in padding(windows))])
    y, winner = None, None
    dtype = np.int8 if prod(windows.kernel) <= 128 else np.int32
    # In the order of the portable op: the first of equal maxima wins, the last of several NaN, and
    # an input rather than the padding.
    offsets = _offsets(windows)
    for index in reversed(range(len(offsets))):
        offset = offsets[index]
        last = [
            at + (o - 1) * s + 1
            for at, o, s in zip(offset, windows.out, windows.stride, strict=True)
        ]
        here = jax.lax.slice(
            padded, (0, 0, *offset), (*value.shape[:2], *last), (1, 1, *windows.stride)
        )
        if y is None:
            y, winner = here, jnp.full(here.shape, index, dtype=dtype)
            continue
        loses = (here < y) | (y != y) | np.logical_not(_inside(windows, offset))
        winner = jnp.where(loses, winner, np.array(index, dtype))
        y = jnp.where(loses & ~(here != here), y, here)
    return JaxArray(y), (JaxArray(winner), windows) if keep else None


@compiled
def max_pool_backward(dy: Any, saved: Any) -> Any:
    winner, windows = saved
    winner, dy = winner.held, dy.held
    zero = np.zeros((), dtype=dy.dtype)
    none, dx = (0, 0, 0), None
    for index, offset in enumerate(_offsets(windows)):
        places = [
            (start + at, n - (start + at + (o - 1) * s + 1), s - 1)
            for start, at, n, o, s in zip(
                windows.start, offset, windows.size, windows.out, windows.stride, strict=True
            )
        ]
        part = jax.lax.pad(jnp.where(winner == index, dy, zero), zero, [none, none, *places])
        dx = part if dx is None else dx + part
    return JaxArray(dx)


KERNELS = {"max_pool": Kernel(max_pool, max_pool_backward)}
