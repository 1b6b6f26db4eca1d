"""Batch norm on NumPy, optionally with ReLU: a few channels at a time, so that all passes but the
first read from the cache.

The backward pass uses x itself, not a stored centred copy: subtracting the mean again is faster
than writing another array. A mean rounded to x's dtype may be off by half a unit in the last place,
which matters if the standard deviation is a few units. A mean is therefore stored as two numbers,
``mean`` and its rounding error ``rest``. The second is used only in the constants of a pass.

The loops over the arrays are a pair of functions (``Passes``): NumPy's are here, and numba has its
own. Notation: rows (C, P) are an activation with the batch last; P = S*N elements for each of C
channels.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy.memory import empty
from portacnn.backends.numpy.pool import clear_where, zeros_for
from portacnn.backends.threads import in_pieces, on_one_blas_thread
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.norm import move_towards
from portacnn.runtime import Array, Kernel

# bytes of a block of channels; the block and its results stay in a core's L2 cache
_NEAR = 512 << 10
_FEW = 64  # elements of the first estimate of a channel's mean
# elements summed in one run; the run sums are added afterwards, which keeps float32 accurate
_RUN = 4096


class Statistics(NamedTuple):
    """Per channel, (C,): the mean as two numbers, and the biased variance."""

    mean: np.ndarray
    rest: np.ndarray
    var: np.ndarray

    def of(self, some: slice) -> "Statistics":
        """Return the statistics of some of the channels."""
        return Statistics(*(numbers[some] for numbers in self))


class Passes(NamedTuple):
    """The loops over the rows of some channels.

    forward(x, y, statistics, weight, bias, eps, own, relu): write the statistics if they are x's
    ``own``; write y. backward(dy, x, y, statistics, weight, eps, own, dbias, dweight, dx): write
    the sums of dy and of dy * xhat, (C,), and dx, those that are not None. dbias and dweight are
    both None or both arrays, and not None if dx depends on the sums (``own``). If y, the output of
    the forward pass, is not None, a ReLU was applied: dy counts only where y is above zero.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]


class Kept(NamedTuple):
    """What the backward pass needs."""

    shape: tuple[int, ...]
    x: np.ndarray
    y: np.ndarray | None
    statistics: Statistics
    weight: np.ndarray | None
    bias: bool
    eps: float
    own: bool


def norm_kernels(passes: Passes) -> dict[str, Kernel]:
    """Return the kernels of ``batch_norm`` and ``batch_norm_relu`` built on these passes."""
    return {
        "batch_norm": _kernel(passes, relu=False),
        "batch_norm_relu": _kernel(passes, relu=True),
    }


def _kernel(passes: Passes, relu: bool) -> Kernel:
    def forward(
        x: Array,
        running_mean: Array | None,
        running_var: Array | None,
        weight: Array | None = None,
        bias: Array | None = None,
        *,
        training: bool = False,
        momentum: Any = 0.1,
        eps: float = 1e-5,
        keep: bool = True,
    ) -> Any:
        if x.dtype not in (np.float32, np.float64) or x.size == 0:
            return NotImplemented
        channels = x.shape[1]
        rows = np.ascontiguousarray(batch_last(x)).reshape(channels, -1)
        y = empty((*x.shape[1:], x.shape[0]), x.dtype)
        y_rows = y.reshape(rows.shape)
        if training:
            statistics = Statistics(*np.zeros((3, channels), dtype=x.dtype))
        else:  # copies, because the running statistics may change before the backward pass
            statistics = Statistics(
                np.array(running_mean), np.zeros_like(running_mean), np.array(running_var)
            )
        factor = _ones(channels, x.dtype) if weight is None else weight
        term = np.zeros_like(factor) if bias is None else bias

        def work(s: slice) -> None:
            passes.forward(
                rows[s], y_rows[s], statistics.of(s), factor[s], term[s], eps, training, relu
            )

        on_one_blas_thread(in_pieces, work, channels, x.size)
        if training and running_mean is not None:
            count = rows.shape[1]
            move_towards(running_mean, statistics.mean, momentum)
            move_towards(running_var, statistics.var * (count / (count - 1)), momentum)
        if not keep:
            return batch_first(y), None
        kept_y = y_rows if relu else None
        return batch_first(y), Kept(
            x.shape, rows, kept_y, statistics, weight, bias is not None, eps, training
        )

    def backward(
        dy: Array,
        saved: Kept,
        *,
        need_dx: bool = True,
        need_dweight: bool = True,
        need_dbias: bool = True,
    ) -> Any:
        shape, x, y, statistics, weight, with_bias, eps, own = saved
        rows = np.ascontiguousarray(batch_last(dy)).reshape(x.shape)
        channels = x.shape[0]
        dbias, dweight = np.empty((2, channels), dtype=x.dtype)
        dx = empty((*shape[1:], shape[0]), x.dtype) if need_dx else None
        dx_rows = None if dx is None else dx.reshape(x.shape)
        factor = _ones(channels, x.dtype) if weight is None else weight
        need_dweight, need_dbias = need_dweight and weight is not None, need_dbias and with_bias
        sums = need_dweight or need_dbias or (own and need_dx)

        def work(s: slice) -> None:
            out = None if dx_rows is None else dx_rows[s]
            before = None if y is None else y[s]
            passes.backward(
                rows[s],
                x[s],
                before,
                statistics.of(s),
                factor[s],
                eps,
                own,
                dbias[s] if sums else None,
                dweight[s] if sums else None,
                out,
            )

        on_one_blas_thread(in_pieces, work, channels, x.size)
        return (
            None if dx is None else batch_first(dx),
            dweight if need_dweight else None,
            dbias if need_dbias else None,
        )

    return Kernel(forward, backward)


@cache
def _ones(count: int, dtype: Any) -> np.ndarray:
    return np.ones(count, dtype=dtype)


# --- NumPy's passes -------------------------------------------------------------------------------


def _blocks(rows: np.ndarray) -> Iterator[slice]:
    step = max(1, _NEAR // (rows.shape[1] * rows.itemsize))
    return (slice(start, start + step) for start in range(0, rows.shape[0], step))


def _runs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split (C, P) into (C, P // _RUN, _RUN) and the remainder."""
    whole = rows.shape[1] // _RUN * _RUN
    return rows[:, :whole].reshape(rows.shape[0], -1, _RUN), rows[:, whole:]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the sum of a * b along the rows, (C, 1)."""
    (runs_a, rest_a), (runs_b, rest_b) = _runs(a), _runs(b)
    return (np.vecdot(runs_a, runs_b).sum(axis=1) + np.vecdot(rest_a, rest_b))[:, None]


def _sum(rows: np.ndarray) -> np.ndarray:
    """Return the sum along the rows, (C, 1), as a product with ones: BLAS is twice as fast as
    NumPy's sum.
    """
    (runs, rest), ones = _runs(rows), _ones(_RUN, rows.dtype)
    return (np.vecdot(runs, ones).sum(axis=1) + np.vecdot(rest, ones[: rest.shape[1]]))[:, None]


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a + b and its rounding error (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _less(rest: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Return rest * factor, the correction of a sum, or 0 where it is not finite, so that an
    infinite sum does not become NaN.
    """
    off = rest * factor
    return np.where(np.isfinite(off), off, 0.0)


def _forward(
    x: np.ndarray,
    y: np.ndarray,
    statistics: Statistics,
    weight: np.ndarray,
    bias: np.ndarray,
    eps: float,
    own: bool,
    relu: bool,
) -> None:
    for block in _blocks(x):
        values, out = x[block], y[block]
        mean, rest, var = (numbers[:, None] for numbers in statistics.of(block))
        if own:
            shift = _own_statistics(values, out, mean, rest, var)
        else:
            np.subtract(values, mean, out=out)
            shift = rest
        scale = weight[block, None] / np.sqrt(var + eps)
        out *= scale
        out += bias[block, None] - shift * scale
        if relu:
            np.maximum(out, zeros_for(out), out=out)


def _own_statistics(
    x: np.ndarray, out: np.ndarray, mean: np.ndarray, rest: np.ndarray, var: np.ndarray
) -> np.ndarray:
    """Write the statistics of the rows x, (C, 1) each. ``out`` receives x minus approximately its
    mean; the rest to subtract is returned.

    First the mean of a few elements is subtracted, computed relative to one of them. A constant
    channel becomes exactly zero, and one pass is enough for mean and variance, because sums of
    squares about this value are as accurate as about the mean. If the value is too far from the
    mean, a second pass uses the mean.
    """
    few, count = x[:, :_FEW], x.shape[1]
    origin = few[:, :1] + (few - few[:, :1]).sum(axis=1, keepdims=True) / few.shape[1]
    np.subtract(x, origin, out=out)
    shift = _sum(out) / count
    mean[...], rest[...] = _two_sum(origin, shift)
    var[...] = _about(shift, _dot(out, out) / count)
    if np.any(shift * shift > var):
        np.subtract(x, mean, out=out)
        shift = rest
        var[...] = _about(shift, _dot(out, out) / count)
    return shift


def _about(shift: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Return the variance from the mean square about a point at distance ``shift``. It is infinite,
    not NaN, on overflow.
    """
    return np.where(np.isinf(square), square, square - shift * shift)


def _backward(
    dy: np.ndarray,
    x: np.ndarray,
    y: np.ndarray | None,
    statistics: Statistics,
    weight: np.ndarray,
    eps: float,
    own: bool,
    dbias: np.ndarray | None,
    dweight: np.ndarray | None,
    dx: np.ndarray | None,
) -> None:
    count = x.shape[1]
    centred = masked = np.empty((0, count), dtype=x.dtype)
    for block in _blocks(x):
        grad = dy[block]
        if centred.shape[0] != grad.shape[0]:  # the last block may be smaller
            centred, masked = (
                np.empty_like(grad),
                np.empty_like(grad) if y is not None and dx is None else centred,
            )
        out = masked if dx is None else dx[block]
        if y is not None:
            clear_where(y[block] <= 0, grad, out)
            grad = out
        mean, rest, var = (numbers[:, None] for numbers in statistics.of(block))
        rstd = 1.0 / np.sqrt(var + eps)
        if dbias is not None and dweight is not None:
            np.subtract(x[block], mean, out=centred)
            along_dy = _sum(grad)
            along_x = _dot(grad, centred) - _less(rest, along_dy)
            dbias[block], dweight[block] = along_dy[:, 0], (along_x * rstd)[:, 0]
        if dx is None:
            continue
        scale = weight[block, None] * rstd
        if not own:
            np.multiply(grad, scale, out=out)
            continue
        # not rstd squared, which overflows if the variance is tiny
        slope = (along_x * rstd) * (rstd / count)
        centred *= slope
        centred += along_dy / count - _less(rest, slope)
        np.subtract(grad, centred, out=out)
        out *= scale


KERNELS = norm_kernels(Passes(_forward, _backward))
