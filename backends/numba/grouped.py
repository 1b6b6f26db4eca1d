"""Convolution in groups with numba: groups of few channels by ``depthwise``, larger ones each as a
convolution of its own, of slices of the channels. With the batch last, these are contiguous.

Kernels of one tap are declined unless there are few channels: NumPy computes them as one batched
product.
"""

from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numba import conv as dense
from portacnn.backends.numba import depthwise
from portacnn.backends.numpy.groups import by_groups
from portacnn.backends.numpy.memory import empty
from portacnn.ops.fused import ConvNorm
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel


class _Saved(NamedTuple):
    """What the forward pass of each group stored, and the channels of a group in and out."""

    groups: list[Any]
    inputs: int
    outputs: int


def _cuts(groups: int, size: int) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(range(0, groups * size + 1, size))]


def conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    if depthwise.supports(x, weight, windows, groups):
        return depthwise.conv(x, weight, bias, windows, groups, keep=keep)
    if prod(windows.kernel) == 1:
        return NotImplemented
    (o, inputs, *_), saved = weight.shape, []
    y = empty((o, *windows.out, x.shape[0]), x.dtype)
    for read, written in zip(_cuts(groups, inputs), _cuts(groups, o // groups), strict=True):
        own = None if bias is None else bias[written]
        result = dense.conv(x[:, read], weight[written], own, windows, 1, keep=keep)
        if result is NotImplemented:
            return result
        y[written] = batch_last(result[0])
        saved.append(result[1])
    return batch_first(y), _Saved(saved, inputs, o // groups) if keep else None


def conv_backward(
    dy: np.ndarray,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    need = {"need_dx": need_dx, "need_dweight": need_dweight, "need_dbias": need_dbias}
    if isinstance(saved, depthwise.Saved):
        return depthwise.conv_backward(dy, saved, **need)
    groups, dx, found = len(saved.groups), None, []
    cuts = _cuts(groups, saved.inputs), _cuts(groups, saved.outputs)
    for read, given, own in zip(*cuts, saved.groups, strict=True):
        part, *gradients = dense.conv_backward(dy[:, given], own, **need)
        if part is not None:
            if dx is None:
                shape = (groups * saved.inputs, *part.shape[2:], len(part))
                dx = empty(shape, part.dtype)
            dx[read] = batch_last(part)
        found.append(gradients)
    dweight, dbias = (
        None if parts[0] is None else np.concatenate(parts) for parts in zip(*found, strict=True)
    )
    return None if dx is None else batch_first(dx), dweight, dbias


def conv_unit(
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Any:
    """Compute ``conv_unit``. Declines pooling, which the portable op does after it."""
    x, *residual = parts
    if pool is not None:
        return NotImplemented
    few = depthwise.supports(x, weight, windows, groups)
    if not few and prod(windows.kernel) == 1:
        return NotImplemented
    o, inputs, *_ = weight.shape
    y = empty((o, *windows.out, x.shape[0]), x.dtype)
    if few:
        depthwise.unit_into(y, parts, weight, bias, windows, groups, norm, low, high)
        return batch_first(y)
    for read, written in zip(_cuts(groups, inputs), _cuts(groups, o // groups), strict=True):
        own = [x[:, read], *(added[:, written] for added in residual)]
        result = dense.conv_unit(
            own,
            weight[written],
            None if bias is None else bias[written],
            windows,
            1,
            None if norm is None else _part(norm, written),
            low,
            high,
            None,
        )
        if result is NotImplemented:
            return result
        y[written] = batch_last(result)
    return batch_first(y)


def prepare_conv_unit(
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Any:
    x = parts[0]
    if pool is not None or not depthwise.supports(x, weight, windows, groups):
        return NotImplemented
    shape = len(weight), *windows.out, x.shape[0]

    def run(parts: list[np.ndarray]) -> np.ndarray:
        y = empty(shape, x.dtype)
        depthwise.unit_into(y, parts, weight, bias, windows, groups, norm, low, high)
        return batch_first(y)

    return run


def _part(norm: ConvNorm, channels: slice) -> ConvNorm:
    *arrays, eps = norm
    return ConvNorm(*(None if array is None else array[channels] for array in arrays), eps)


KERNELS = by_groups(
    dense.KERNELS,
    {"conv": Kernel(conv, conv_backward), "conv_unit": Kernel(conv_unit, None, prepare_conv_unit)},
    (_Saved, depthwise.Saved),
)
