"""The CUDA kernels of convolution, run on the host, against sums over taps in float64."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_rig import close, needs_compiler, orders, rigged
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends import cupy_conv, cupy_plan
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows

pytestmark = needs_compiler


class Case(NamedTuple):
    n: int
    c: int
    o: int
    groups: int
    windows: Windows
    bias: bool
    seed: int


def slices(windows: Windows) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """For every tap its place in the kernel, and in the padded input the slices that it reads."""
    return [
        (
            k,
            tuple(
                slice(i * d, i * d + (o - 1) * s + 1, s)
                for i, d, o, s in zip(k, windows.dilation, windows.out, windows.stride, strict=True)
            ),
        )
        for k in product(*map(range, windows.kernel))
    ]


def padded(x: np.ndarray, windows: Windows) -> np.ndarray:
    return np.pad(x, [(0, 0), (0, 0), *windows.pads])


def convolution(x: np.ndarray, weight: np.ndarray, windows: Windows, groups: int) -> np.ndarray:
    x, parts = padded(x, windows), []
    for xg, wg in zip(np.split(x, groups, 1), np.split(weight, groups), strict=True):
        parts.append(sum(np.einsum("nc...,oc->no...", xg[:, :, *s], wg[:, :, *k]) for k, s in slices(windows)))
    return np.concatenate(parts, 1)


def gradients(x: np.ndarray, weight: np.ndarray, dz: np.ndarray, windows: Windows, groups: int) -> tuple[Any, Any]:
    x = padded(x, windows)
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    for xg, wg, zg, dxg, dwg in zip(
        np.split(x, groups, 1),
        np.split(weight, groups),
        np.split(dz, groups, 1),
        np.split(dx, groups, 1),
        np.split(dweight, groups),
        strict=True,
    ):
        for k, s in slices(windows):
            sums = (0, *range(2, x.ndim))
            dwg[:, :, *k] = np.tensordot(zg, xg[:, :, *s], (sums, sums))
            dxg[:, :, *s] += np.einsum("no...,oc->nc...", zg, wg[:, :, *k])
    inside = tuple(slice(before, before + n) for (before, _), n in zip(windows.pads, windows.size, strict=True))
    return dx[:, :, *inside], dweight


def pooled(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2x2 maxima of (N, O, H, W), and for each input whether it is its window's first maximum."""
    n, o, h, w = y.shape
    cut = y[:, :, : h // 2 * 2, : w // 2 * 2].reshape(n, o, h // 2, 2, w // 2, 2).transpose(0, 1, 2, 4, 3, 5)
    flat = cut.reshape(*cut.shape[:4], 4)
    first = np.eye(4, dtype=bool)[flat.argmax(-1)].reshape(cut.shape).transpose(0, 1, 2, 4, 3, 5)
    chosen = np.zeros(y.shape, bool)
    chosen[:, :, : h // 2 * 2, : w // 2 * 2] = first.reshape(n, o, h // 2 * 2, w // 2 * 2)
    return flat.max(-1), chosen


def numbers(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    draw = np.random.default_rng(case.seed).standard_normal
    x, weight = draw((case.n, case.c, *case.windows.size)), draw((case.o, case.c // case.groups, *case.windows.kernel))
    return x, weight, draw(case.o) if case.bias else None


def check(case: Case, dtype: str, order: str, kind: str) -> list:
    """kind: conv, relu, or pool for 2x2 pooling after ReLU. Gives the launches."""
    x, weight, bias = numbers(case)
    windows, groups = case.windows, case.groups
    last = (*range(1, x.ndim), 0)
    with rigged(order, case.seed) as rig:
        dx_, dw_ = rig.array(x, dtype, last), rig.array(weight, dtype)
        db_ = None if bias is None else rig.array(bias, dtype)
        # Rounded to dtype once: the rest of the reckoning is in float64.
        x, weight = (np.asarray(a, "float64") for a in (dx_, dw_))
        bias = None if db_ is None else np.asarray(db_, "float64")
        wanted = convolution(x, weight, windows, groups)
        if bias is not None:
            wanted += bias.reshape(-1, *[1] * (x.ndim - 2))
        through = np.ones(wanted.shape, bool)
        pool = None
        if kind == "conv":
            result = cupy_conv.conv(dx_, dw_, db_, windows, groups, keep=True)
        else:
            if kind == "pool":
                pool = Windows.of(windows.out, 2, 2)
            result = cupy_conv.conv_relu(dx_, dw_, db_, windows, groups, pool, keep=True)
            through = wanted > 0
            wanted = np.maximum(wanted, 0)
        if pool is not None:
            wanted, chosen = pooled(wanted)
            through &= chosen
        y, saved = result
        close(y, wanted, dtype)
        dy = rig.array(np.random.default_rng(case.seed + 1).standard_normal(wanted.shape), dtype, last)
        dz = np.asarray(dy, "float64")
        if pool is not None:
            whole = np.zeros(through.shape)
            h, w = dz.shape[2:]
            whole[:, :, : 2 * h, : 2 * w] = dz.repeat(2, 2).repeat(2, 3)
            dz = whole
        dz = np.where(through, dz, 0)
        got = cupy_conv.conv_backward(dy, saved)
        dx, dweight = gradients(x, weight, dz, windows, groups)
        close(got[0], dx, dtype)
        close(got[1], dweight, dtype)
        if bias is None:
            assert got[2] is None
        else:
            close(got[2], dz.sum((0, *range(2, dz.ndim))), dtype)
    return rig.launches


@st.composite
def cases(draw: st.DrawFn, axes: tuple[int, ...] = (1, 2), largest: int = 9) -> Case:
    count = draw(st.sampled_from(axes))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * count))

    kernel, stride, dilation = each(1, 4), each(1, 3), each(1, 3)
    pads = tuple(zip(each(0, 3), each(0, 3), strict=True))
    least = (max(1, d * (k - 1) + 1 - sum(p)) for k, d, p in zip(kernel, dilation, pads, strict=True))
    size = tuple(n + more for n, more in zip(least, each(0, largest), strict=True))
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    c, o = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 9))
    n = draw(st.sampled_from([1, 2, 3, 5, 8, 17, 33]))
    return Case(n, c, o, groups, Windows.of(size, kernel, stride, pads, dilation), draw(st.booleans()), draw(st.integers(0, 99)))


@settings(max_examples=25)
@given(cases(), st.sampled_from(["float32", "float64"]), orders, st.sampled_from(["conv", "relu"]))
def test_convolution(case: Case, dtype: str, order: str, kind: str):
    check(case, dtype, order, kind)


@settings(max_examples=15)
@given(cases(axes=(2,)), st.sampled_from(["float32", "float64"]), orders)
def test_convolution_with_relu_and_pooling(case: Case, dtype: str, order: str):
    if min(case.windows.out) > 1:
        check(case, dtype, order, "pool")
