"""Pooling with a sliding window: the maximum or the mean of each window. ``adaptive`` has pooling
to a fixed output size.

Notation: N batch, C channels, S/OUT the spatial axes in/out (H, W/OH, OW). Each tap of the window
is one slice of the input (see ``windows``). Pooling combines the taps one after the other and
builds no columns. A cell of the padding is never a maximum.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

from portacnn.arguments import listed
from portacnn.errors import ArgumentError, PortacnnError
from portacnn.ops.complex_parts import part_by_part
from portacnn.ops.dispatch import Cache, op
from portacnn.ops.faces import check_input, faces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Padding, Windows, per_axis
from portacnn.runtime import Array, backend_of


@op()
def max_pool(x: Array, windows: Windows, *, keep: bool) -> tuple[Array, tuple | None]:
    """Return the maximum of each window: x (N, C, *S) -> y (N, C, *OUT). A window with a NaN
    returns NaN.
    """
    xp = backend_of(x).xp
    xt = _packed(x, windows)
    shape = (xt.shape[0], *windows.out, xt.shape[-1])
    y = xp.full(shape, -float("inf"), dtype=x.dtype, device=x.device)
    # the tap whose input is y
    winner = xp.zeros(shape, dtype=_counter(xp, windows), device=x.device) if keep else None
    # The taps run from the last to the first, and a later one wins unless it is less. So the first
    # of equal maxima wins in the end, and if all inputs are -inf, an input wins and not the
    # padding. Of several NaN the last one wins, as in PyTorch.
    for tap in reversed(windows.taps):
        here, seen = xt[tap.reads], tap.reaches
        if winner is not None:
            loses = (here < y[seen]) | (y[seen] != y[seen])
            winner[seen] = xp.where(loses, winner[seen], tap.index)
        y[seen] = xp.maximum(y[seen], here)
    return batch_first(y), (xt.shape, winner, windows) if keep else None


@max_pool.backward
def max_pool_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient of max pooling: dy (N, C, *OUT) -> dx (N, C, *S).

    The whole gradient goes to the first of equal maxima in reading order, or to the last of several
    NaN, as in PyTorch.
    """
    shape, winner, windows = saved
    xp = backend_of(dy).xp
    dy = batch_last(dy)
    dx = xp.zeros(shape, dtype=dy.dtype, device=dy.device)
    for tap in windows.taps:
        dx[tap.reads] += xp.where(winner[tap.reaches] == tap.index, dy[tap.reaches], 0.0)
    return batch_first(dx)


def _packed(x: Array, windows: Windows) -> Array:
    """Return (N, C, *S) as (C, *S, N), contiguous unless the windows read little of it."""
    xt = batch_last(x)
    return xt if windows.sparse else backend_of(x).contiguous(xt)


def _counter(xp: Any, windows: Windows) -> Any:
    """Return the smallest integer dtype that can number the taps; it is written and read once per
    tap.
    """
    return xp.int8 if prod(windows.kernel) <= 128 else xp.int32


@op()
def avg_pool(
    x: Array, windows: Windows, count_include_pad: bool, divisor: int | None, *, keep: bool
) -> tuple[Array, tuple | None]:
    """Return the mean of each window, with or without the zeros of the padding, or sum / divisor: x
    (N, C, *S) -> y (N, C, *OUT).
    """
    xp = backend_of(x).xp
    xt = _packed(x, windows)
    y = xp.zeros((xt.shape[0], *windows.out, xt.shape[-1]), dtype=x.dtype, device=x.device)
    for tap in windows.taps:
        y[tap.reaches] += xt[tap.reads]
    y *= _weights(x, windows, count_include_pad, divisor)
    return batch_first(y), (xt.shape, windows, count_include_pad, divisor) if keep else None


@avg_pool.backward
def avg_pool_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient of average pooling: dy (N, C, *OUT) -> dx (N, C, *S).

    The gradient of an output, divided as the mean was, goes to all inputs of its window.
    """
    shape, windows, count_include_pad, divisor = saved
    xp = backend_of(dy).xp
    share = batch_last(dy) * _weights(dy, windows, count_include_pad, divisor)
    dx = xp.zeros(shape, dtype=dy.dtype, device=dy.device)
    for tap in windows.taps:
        dx[tap.reads] += share[tap.reaches]
    return batch_first(dx)


part_by_part(avg_pool, avg_pool_backward)


def _weights(
    like: Array, windows: Windows, count_include_pad: bool, divisor: int | None
) -> Array | float:
    """Return 1 / (number of cells) of each window, or 1 / divisor: a number if all are equal, else
    (*OUT, 1).

    A window that extends beyond the end in ceil mode counts the padding in it, but no cell beyond
    the padding.
    """
    if divisor is not None:
        return 1.0 / divisor
    inside = windows.covers
    padded = tuple(
        n + before + after for n, (before, after) in zip(windows.size, windows.pads, strict=True)
    )
    if inside or (
        count_include_pad and all(r <= p for r, p in zip(windows.extent, padded, strict=True))
    ):
        return 1.0 / prod(windows.kernel)
    xp = backend_of(like).xp
    weights = xp.ones((1,), dtype=like.dtype, device=like.device)
    for n, k, s, d, (before, after), out in zip(
        windows.size,
        windows.kernel,
        windows.stride,
        windows.dilation,
        windows.pads,
        windows.out,
        strict=True,
    ):
        low, high = (-before, n + after) if count_include_pad else (0, n)
        # Integers, because float32 and bfloat16 cannot represent every cell index of a long axis.
        start = xp.arange(out, dtype=xp.int64, device=like.device) * s - before
        # The cells start, start + d, ..., start + (k - 1)*d that are inside, from first to last.
        first = (xp.clip(start, min=low) - start + (d - 1)) // d
        last = (xp.clip(start + (k - 1) * d, max=high - 1) - start) // d
        cells = xp.astype(last - first + 1, like.dtype)
        weights = weights[..., None] / cells  # adds an axis per spatial axis: (1, OH, OW)
    return xp.reshape(weights, (*windows.out, 1))


# --- the public functions -------------------------------------------------------------------------


def pool_windows(
    size: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: Padding,
    dilation: int | Sequence[int],
    ceil_mode: bool,
) -> Windows:
    """Return the geometry for an input of this spatial size. ``stride=None`` means the kernel size.

    Every window must contain an input. PyTorch ensures this by limiting the padding to half of the
    kernel. The same limit applies here to a padding in PyTorch's form (integers). A padding given
    as pairs (before, after), as in ONNX, may be wider.

    Raises:
        ShapeError, ArgumentError: as for ``conv2d``; ArgumentError also if the padding is too wide.
    """
    windows = Windows.of(
        size, kernel_size, kernel_size if stride is None else stride, padding, dilation, ceil_mode
    )
    padding = listed(padding)
    by_side = isinstance(padding, Sequence) and all(isinstance(p, Sequence) for p in padding)
    for pads, k, d in zip(windows.pads, windows.kernel, windows.dilation, strict=True):
        extent = d * (k - 1) + 1
        if (windows.blind or not by_side) and max(pads) > extent // 2:
            raise ArgumentError(
                f"padding must be at most half of the kernel {extent}, got {pads}; some windows "
                "would contain only padding"
            )
    if windows.blind:
        raise ArgumentError(
            f"padding {windows.pads} makes windows of the kernel {windows.kernel} contain only "
            "padding; use less padding"
        )
    return windows


def _checked(name: str, axes: int, x: Array, *geometry: Any, linear: bool = False) -> Windows:
    """Check the input of the op called ``name`` and return the geometry."""
    check_input(name, axes, x, linear=linear)
    try:
        return pool_windows(x.shape[2:], *geometry)
    except PortacnnError as error:
        raise error.at(name)


def _max_pool(
    axes: int,
    x: Array,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Take the maximum of each window, as torch.nn.functional.max_pool1d, max_pool2d and
    max_pool3d.

    Windows that would extend beyond the end are left out: 28 cells with kernel 5 and stride 5 make
    5 outputs and 3 unread cells. With ``ceil_mode`` they are kept and use the cells that exist.

    Args:
        x: (N, C, *S), floating point; S is W, (H, W) or (D, H, W).
        kernel_size, stride, dilation: an integer, or one per spatial axis. The default stride is
            the kernel size.
        padding: cells around the input that are never a maximum, as for ``conv2d``. Integers are
            limited to half of the kernel; pairs (before, after) may be wider if every window
            contains an input.
        ceil_mode: keep windows that start inside the input and extend beyond its end.
        keep: store what the backward function needs.

    Returns:
        y (N, C, *OUT), with OUT = (S + before + after - dilation*(K-1) - 1) / stride + 1 rounded
        down (with ``ceil_mode`` up), and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``conv2d``.

    Example:
        >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
        >>> y, cache = ops.max_pool2d(x, 2)
        >>> y[0, 0]
        array([[ 5.,  7.],
               [13., 15.]])
        >>> ops.max_pool2d_backward(y, cache)[0, 0]
        array([[ 0.,  0.,  0.,  0.],
               [ 0.,  5.,  0.,  7.],
               [ 0.,  0.,  0.,  0.],
               [ 0., 13.,  0., 15.]])
    """
    windows = _checked(
        f"max_pool{axes}d", axes, x, kernel_size, stride, padding, dilation, ceil_mode
    )
    return max_pool(x, windows, keep=keep)


def _avg_pool(
    axes: int,
    x: Array,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: Padding = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    dilation: int | Sequence[int] = 1,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Average each window, as torch.nn.functional.avg_pool1d, avg_pool2d and avg_pool3d, and ONNX's
    with dilation.

    Args:
        x: (N, C, *S), floating point or complex; S is W, (H, W) or (D, H, W).
        kernel_size, stride: an integer, or one per spatial axis. The default stride is the kernel
            size.
        padding: zeros around the input, as for ``max_pool2d``.
        ceil_mode: keep windows that start inside the input and extend beyond its end.
        count_include_pad: divide by the size of the window including padding; if False, by the
            number of its cells inside the input. Cells beyond the padding never count.
        divisor_override: divide by this integer instead.
        dilation: the distance between the cells of a window, an integer or one per spatial axis;
            not in PyTorch.
        keep: store what the backward function needs.

    Returns:
        y (N, C, *OUT), OUT as for ``max_pool2d``, and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: as for ``conv2d``.

    Example:
        >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
        >>> y, cache = ops.avg_pool2d(x, 2)
        >>> y[0, 0]
        array([[ 2.5,  4.5],
               [10.5, 12.5]])
        >>> ops.avg_pool2d_backward(np.ones_like(y), cache)[0, 0, 0]
        array([0.25, 0.25, 0.25, 0.25])
    """
    name = f"avg_pool{axes}d"
    windows = _checked(
        name, axes, x, kernel_size, stride, padding, dilation, ceil_mode, linear=True
    )
    return avg_pool(
        x, windows, bool(count_include_pad), checked_divisor(divisor_override, name), keep=keep
    )


def checked_divisor(divisor: int | None, where: str) -> int | None:
    """Return ``divisor_override`` as an integer of at least 1, or None. Raises ArgumentError."""
    if divisor is None:
        return None
    try:
        return per_axis("divisor_override", divisor, 1, 1)[0]
    except PortacnnError as error:
        raise error.at(where)


max_pool1d, max_pool2d, max_pool3d = faces("max_pool", _max_pool)
max_pool1d_backward = max_pool2d_backward = max_pool3d_backward = max_pool_backward
avg_pool1d, avg_pool2d, avg_pool3d = faces("avg_pool", _avg_pool)
avg_pool1d_backward = avg_pool2d_backward = avg_pool3d_backward = avg_pool_backward
