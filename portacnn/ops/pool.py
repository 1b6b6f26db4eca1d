"""Pooling: the maximum or the mean of each window.

Notation: N batch, C channels, S/OUT the spatial axes in/out (H, W/OH, OW). Each tap of the window is one slice of the
input (see ``windows``), and pooling folds the taps together one after the other: no columns are built. A padded cell is
never anyone's maximum.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.ops.dispatch import Cache, check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import AXES, Padding, Windows
from portacnn.runtime import Array, backend_of, describe


@op()
def max_pool(x: Array, windows: Windows, *, keep: bool) -> tuple[Array, tuple | None]:
    """x (N, C, *S) -> y (N, C, *OUT): the largest input under each window; NaN if there is one."""
    backend = backend_of(x)
    xp = backend.xp
    xt = backend.contiguous(batch_last(x))  # (C, *S, N)
    shape = (xt.shape[0], *windows.out, xt.shape[-1])
    y = xp.full(shape, -float("inf"), dtype=x.dtype, device=x.device)
    winner = xp.zeros(shape, dtype=_counter(xp, windows), device=x.device) if keep else None  # whose input y is
    for tap in reversed(windows.taps):  # backwards, so that of equal inputs the first is the last to win
        here, seen = xt[tap.reads], tap.reaches
        if winner is not None:
            winner[seen] = xp.where(here >= y[seen], tap.index, winner[seen])
        y[seen] = xp.maximum(y[seen], here)
    return batch_first(y), (xt.shape, winner, windows) if keep else None


@max_pool.backward
def max_pool_backward(dy: Array, saved: tuple) -> Array:
    """dy (N, C, *OUT) -> dx (N, C, *S): each gradient goes to the first input, in reading order, that is the maximum."""
    shape, winner, windows = saved
    xp = backend_of(dy).xp
    dy = batch_last(dy)
    dx = xp.zeros(shape, dtype=dy.dtype, device=dy.device)
    for tap in windows.taps:
        dx[tap.reads] += xp.where(winner[tap.reaches] == tap.index, dy[tap.reaches], 0.0)
    return batch_first(dx)


def _counter(xp: Any, windows: Windows) -> Any:
    """The smallest integer type that can number the taps: it is written and read once a tap."""
    return xp.int8 if prod(windows.kernel) <= 128 else xp.int32


@op()
def avg_pool(x: Array, windows: Windows, count_include_pad: bool, *, keep: bool) -> tuple[Array, tuple | None]:
    """x (N, C, *S) -> y (N, C, *OUT): the mean under each window, zeros of the padding counted or not."""
    xp = backend_of(x).xp
    xt = backend_of(x).contiguous(batch_last(x))
    y = xp.zeros((xt.shape[0], *windows.out, xt.shape[-1]), dtype=x.dtype, device=x.device)
    for tap in windows.taps:
        y[tap.reaches] += xt[tap.reads]
    y *= _weights(x, windows, count_include_pad)
    return batch_first(y), (xt.shape, windows, count_include_pad) if keep else None


@avg_pool.backward
def avg_pool_backward(dy: Array, saved: tuple) -> Array:
    """dy (N, C, *OUT) -> dx (N, C, *S): each gradient, divided as the mean was, goes to all inputs of its window."""
    shape, windows, count_include_pad = saved
    xp = backend_of(dy).xp
    share = batch_last(dy) * _weights(dy, windows, count_include_pad)
    dx = xp.zeros(shape, dtype=dy.dtype, device=dy.device)
    for tap in windows.taps:
        dx[tap.reads] += share[tap.reaches]
    return batch_first(dx)


def _weights(like: Array, windows: Windows, count_include_pad: bool) -> Array | float:
    """One over the number of cells in each window: a number where all are alike, else (*OUT, 1).

    A window that hangs over the end in ceil mode counts the padding it covers, but nothing beyond the padding.
    """
    inside = windows.covers
    padded = tuple(n + before + after for n, (before, after) in zip(windows.size, windows.pads, strict=True))
    reach = tuple((o - 1) * s + k for o, s, k in zip(windows.out, windows.stride, windows.kernel, strict=True))
    if inside or (count_include_pad and all(r <= p for r, p in zip(reach, padded, strict=True))):
        return 1.0 / prod(windows.kernel)
    xp = backend_of(like).xp
    weights = xp.ones((1,), dtype=like.dtype, device=like.device)
    for n, k, s, (before, after), out in zip(
        windows.size, windows.kernel, windows.stride, windows.pads, windows.out, strict=True
    ):
        low, high = (-before, n + after) if count_include_pad else (0, n)
        start = xp.arange(out, dtype=like.dtype, device=like.device) * s - before
        cells = xp.minimum(start + k, high) - xp.maximum(start, low)
        weights = weights[..., None] / cells  # one axis more, for each spatial axis: (1, OH, OW)
    return xp.reshape(weights, (*windows.out, 1))


# --- the public faces -----------------------------------------------------------------------------------------------


def pool_windows(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> Windows:
    """The geometry for an input of this spatial size; ``stride=None`` means the kernel's. ShapeError or ArgumentError."""
    windows = Windows.of(size, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode)
    for (before, after), k, d in zip(windows.pads, windows.kernel, windows.dilation, strict=True):
        if max(before, after) > (d * (k - 1) + 1) // 2:
            raise ArgumentError(
                f"padding {(before, after)} is more than half of the kernel {d * (k - 1) + 1}: "
                "some windows would see nothing but padding"
            )
    if _unseen(windows):
        raise ArgumentError(f"padding {windows.pads} leaves windows of the kernel {windows.kernel} nothing else to see")
    return windows


@lru_cache(maxsize=4096)
def _unseen(windows: Windows) -> bool:
    """Whether some window has every tap in the padding, as can be with dilation."""
    axes = range(len(windows.out))
    seen = [{o for tap in windows.taps for o in range(windows.out[i])[tap.reaches[i + 1]]} for i in axes]
    return any(len(seen[i]) < windows.out[i] for i in axes)


def _checked(name: str, axes: int, x: Array, *geometry: Any) -> Windows:
    """Check the input of the op called ``name``, and give the geometry."""
    check_arrays(name, x=x)
    if x.ndim != axes + 2:
        raise ShapeError(f"expected an input (N, C, {AXES[axes]}), got {x.ndim} axes (input {describe(x)})", name)
    try:
        return pool_windows(x.shape[2:], *geometry)
    except PortacnnError as error:
        raise error.at(name)


def max_pool2d(
    x: Array,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """The maximum over each window, as torch.nn.functional.max_pool2d.

    Windows that would hang over the bottom or right edge are left out (28 by 5 with stride 5: 5 outputs, three rows
    unseen), or with ``ceil_mode`` are kept and see what there is.

    Args:
        x: (N, C, H, W), floating point.
        kernel_size, stride, dilation: a number, or (vertical, horizontal); the stride is the kernel's where not given.
        padding: cells around the input that are never a maximum; as for ``conv2d``, at most half of the kernel.

    Returns:
        y (N, C, OH, OW), with OH = (H + padding - dilation*(KH-1) - 1) // stride + 1, and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``conv2d``.
    """
    return max_pool(x, _checked("max_pool2d", 2, x, kernel_size, stride, padding, dilation, ceil_mode), keep=keep)


def max_pool2d_backward(dy: Array, cache: Cache | None) -> Array:
    """The gradient dx (N, C, H, W) of ``max_pool2d``. Of equal maxima the first, row by row, takes it all, as in PyTorch."""
    return max_pool_backward(dy, cache)


def avg_pool2d(
    x: Array,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """The mean over each window, as torch.nn.functional.avg_pool2d.

    Args:
        x: (N, C, H, W), floating point.
        kernel_size, stride: a number, or (vertical, horizontal); the stride is the kernel's where not given.
        padding: zeros around the input, as for ``conv2d``, at most half of the kernel.
        ceil_mode: keep windows that hang over the end.
        count_include_pad: divide by the whole window, padding too, or only by the cells inside the input.

    Returns:
        y (N, C, OH, OW) and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``conv2d``.
    """
    windows = _checked("avg_pool2d", 2, x, kernel_size, stride, padding, 1, ceil_mode)
    return avg_pool(x, windows, count_include_pad, keep=keep)


def avg_pool2d_backward(dy: Array, cache: Cache | None) -> Array:
    """The gradient dx (N, C, H, W) of ``avg_pool2d``."""
    return avg_pool_backward(dy, cache)
