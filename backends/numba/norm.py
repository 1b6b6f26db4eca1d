"""Batch norm compiled by numba, optionally with ReLU: one channel at a time, without intermediate
arrays.

In most networks a channel stays in the L2 cache from one pass to the next. The loops are written so
that LLVM vectorizes them: they cover the whole of a slice, and both alternatives of a selection are
loaded first. Sums are made of runs, which are accumulated in float64. The algorithm and the names
are those of ``numpy/norm.py``.
"""

from functools import partial
from typing import Any

import numpy as np

from portacnn.backends.numba.compile import compiled
from portacnn.backends.numpy.norm import Passes, Statistics, norm_kernels

_RUN = 2048


@partial(compiled, reorder=False)
def _two_sum(a, b):
    """Return a + b and its rounding error (Knuth). Must not be reordered."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


@compiled
def _mean(row):
    """Return the mean as two numbers, computed relative to the first element, so that a constant
    row has exactly that mean.
    """
    origin, total = row[0], 0.0
    for start in range(0, row.size, _RUN):
        run, part = row[start : start + _RUN], row.dtype.type(0)
        for i in range(run.size):
            part += run[i] - origin
        total += part
    return _two_sum(origin, row.dtype.type(total / row.size))


@compiled
def _variance(row, mean, rest):
    """Return the biased variance about the mean (mean + rest)."""
    total = 0.0
    for start in range(0, row.size, _RUN):
        run, part = row[start : start + _RUN], row.dtype.type(0)
        for i in range(run.size):
            centred = run[i] - mean
            part += centred * centred
        total += part
    # avoids infinity - infinity
    return total / row.size - rest * rest if np.isfinite(total) else total


@compiled
def _forward(x, y, means, rests, variances, weight, bias, eps, own, relu):
    number = x.dtype.type
    zero = number(0)
    for c in range(x.shape[0]):
        row, out = x[c], y[c]
        if own:
            means[c], rests[c] = _mean(row)
            variances[c] = _variance(row, means[c], rests[c])
        mean, scale = means[c], number(weight[c] / np.sqrt(variances[c] + eps))
        shift = bias[c] - rests[c] * scale
        if relu:
            for i in range(row.size):
                value = (row[i] - mean) * scale + shift
                out[i] = zero if value < zero else value  # NaN stays
        else:
            for i in range(row.size):
                out[i] = (row[i] - mean) * scale + shift


@compiled
def _less(rest, factor):
    """Return rest * factor, the correction of a sum, or 0 if it is not finite, so that an infinite
    sum does not become NaN.
    """
    off = rest * factor
    return off if np.isfinite(off) else 0.0


@compiled
def _sums(grad, row, result, mean, relu):
    """Return the sums of grad and of grad * (row - mean)."""
    number = row.dtype.type
    zero, along_dy, along_x = number(0), 0.0, 0.0
    for start in range(0, row.size, _RUN):
        run, grads, results = (
            row[start : start + _RUN],
            grad[start : start + _RUN],
            result[start : start + _RUN],
        )
        part_dy, part_x = number(0), number(0)
        if relu:
            for i in range(run.size):
                value, above, centred = grads[i], results[i], run[i] - mean
                value = zero if above <= zero else value
                part_dy += value
                part_x += value * centred
        else:
            for i in range(run.size):
                value, centred = grads[i], run[i] - mean
                part_dy += value
                part_x += value * centred
        along_dy += part_dy
        along_x += part_x
    return along_dy, along_x


@compiled
def _backward(
    dy, x, y, means, rests, variances, weight, eps, own, relu, dbias, dweight, dx, need_dx, sums
):
    number = x.dtype.type
    zero = number(0)
    for c in range(x.shape[0]):
        grad, row, result, mean = dy[c], x[c], y[c], means[c]
        rstd = 1.0 / np.sqrt(variances[c] + eps)
        along_dy, along_x = 0.0, 0.0
        if sums:
            along_dy, along_x = _sums(grad, row, result, mean, relu)
            along_x -= _less(rests[c], along_dy)
            dbias[c], dweight[c] = along_dy, along_x * rstd
        if not need_dx:
            continue
        out, scale = dx[c], number(weight[c] * rstd)
        steep = along_x * rstd * rstd / row.size
        slope, shift = number(steep), number(along_dy / row.size - _less(rests[c], steep))
        if own and relu:
            for i in range(row.size):
                value, above, centred = grad[i], result[i], row[i] - mean
                value = zero if above <= zero else value
                out[i] = (value - slope * centred - shift) * scale
        elif own:
            for i in range(row.size):
                out[i] = (grad[i] - slope * (row[i] - mean) - shift) * scale
        elif relu:
            for i in range(row.size):
                value, above = grad[i], result[i]
                value = zero if above <= zero else value
                out[i] = value * scale
        else:
            for i in range(row.size):
                out[i] = grad[i] * scale


def _writeable(array: np.ndarray) -> np.ndarray:
    """Return a copy of a read-only array, because numba would compile every kernel again for its
    type.
    """
    return array if array.flags.writeable else array.copy()


def _start_forward(
    x: np.ndarray,
    y: np.ndarray,
    statistics: Statistics,
    weight: np.ndarray,
    bias: np.ndarray,
    *how: Any,
) -> None:
    _forward(_writeable(x), y, *statistics, np.array(weight), np.array(bias), *how)


def _start_backward(
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
    dy = _writeable(dy)
    unused = np.empty((len(x), 1), dtype=x.dtype)
    result, out = dy if y is None else y, unused if dx is None else dx
    _backward(
        dy,
        _writeable(x),
        result,
        *statistics,
        np.array(weight),
        eps,
        own,
        y is not None,
        unused[:, 0] if dbias is None else dbias,
        unused[:, 0] if dweight is None else dweight,
        out,
        dx is not None,
        dbias is not None,
    )


KERNELS = norm_kernels(Passes(_start_forward, _start_backward))
