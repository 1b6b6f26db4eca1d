"""The CUDA kernels of convolution, run on the host, against sums over taps in float64."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import conv as cupy_conv
from portacnn.backends.cupy import geometry
from portacnn.backends.cupy import plan as cupy_plan
from portacnn.backends.cupy.memory import vector
from portacnn.ops.dispatch import PRECISIONS, use_precision
from portacnn.ops.fused import ConvNorm
from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows
from support.cuda_rig import close, needs_compiler, orders, rigged, rounded
from support.drawing import arguments_of

pytestmark = needs_compiler
ROUNDINGS = PRECISIONS[1:]


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
        parts.append(
            sum(
                np.einsum("nc...,oc->no...", xg[:, :, *s], wg[:, :, *k]) for k, s in slices(windows)
            )
        )
    return np.concatenate(parts, 1)


def gradients(
    x: np.ndarray, weight: np.ndarray, dz: np.ndarray, windows: Windows, groups: int
) -> tuple[Any, Any]:
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
    inside = tuple(
        slice(before, before + n) for (before, _), n in zip(windows.pads, windows.size, strict=True)
    )
    return dx[:, :, *inside], dweight


def pooled(y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """2x2 maxima of (N, O, H, W), and for each input whether it is its window's first maximum."""
    n, o, h, w = y.shape
    cut = (
        y[:, :, : h // 2 * 2, : w // 2 * 2]
        .reshape(n, o, h // 2, 2, w // 2, 2)
        .transpose(0, 1, 2, 4, 3, 5)
    )
    flat = cut.reshape(*cut.shape[:4], 4)
    first = np.eye(4, dtype=bool)[flat.argmax(-1)].reshape(cut.shape).transpose(0, 1, 2, 4, 3, 5)
    chosen = np.zeros(y.shape, bool)
    chosen[:, :, : h // 2 * 2, : w // 2 * 2] = first.reshape(n, o, h // 2 * 2, w // 2 * 2)
    return flat.max(-1), chosen


def numbers(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    draw = np.random.default_rng(case.seed).standard_normal
    x, weight = (
        draw((case.n, case.c, *case.windows.size)),
        draw((case.o, case.c // case.groups, *case.windows.kernel)),
    )
    return x, weight, draw(case.o) if case.bias else None


def factors_of(case: Case, precision: str) -> str:
    """What its factors are rounded to: with few channels in a group, no tensor core computes it."""
    few = case.groups > 1 and max(case.c, case.o) <= 4 * case.groups
    return "float32" if few else precision


def check(case: Case, dtype: str, order: str, kind: str, precision: str = "float32") -> list:
    """kind: conv, relu, or pool for 2x2 pooling after ReLU. precision: what factors are rounded to.
    Gives the launches."""
    x, weight, bias = numbers(case)
    windows, groups = case.windows, case.groups
    last = (*range(1, x.ndim), 0)
    used = factors_of(case, precision)
    with rigged(order, case.seed) as rig, use_precision(precision):
        dx_, dw_ = rig.array(x, dtype, last), rig.array(weight, dtype)
        db_ = None if bias is None else rig.array(bias, dtype)
        # Rounded to dtype once: the rest of the reckoning is in float64.
        x, weight = (rounded(a, used) for a in (dx_, dw_))
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
        sizes = np.abs(x), np.abs(weight)
        terms = convolution(*sizes, windows, groups)
        close(y, wanted, dtype, terms + (0 if bias is None else np.abs(bias).max()))
        dy = rig.array(
            np.random.default_rng(case.seed + 1).standard_normal(wanted.shape), dtype, last
        )
        dz = rounded(dy, used)
        if pool is not None:
            whole = np.zeros(through.shape)
            h, w = dz.shape[2:]
            whole[:, :, : 2 * h, : 2 * w] = dz.repeat(2, 2).repeat(2, 3)
            dz = whole
        dz = np.where(through, dz, 0)
        got = cupy_conv.conv_backward(dy, saved)
        terms = gradients(*sizes, np.abs(dz), windows, groups)
        for one, right, size in zip(
            got, gradients(x, weight, dz, windows, groups), terms, strict=False
        ):
            close(one, right, dtype, size)
        if bias is None:
            assert got[2] is None
        else:
            sums = (0, *range(2, dz.ndim))
            close(got[2], dz.sum(sums), dtype, np.abs(dz).sum(sums))
    return rig.launches


def cases(name: str = "conv") -> st.SearchStrategy[Case]:
    """The sizes of an example of the table."""

    def case_of(arguments: dict[str, Any], seed: int) -> Case:
        x, weight, *_, groups = (arguments[n] for n in ("x", "weight", "groups"))
        bias = arguments["bias"] is not None
        return Case(*x.shape[:2], len(weight), groups, arguments["windows"], bias, seed)

    return st.builds(case_of, arguments_of(name, "small"), st.integers(0, 99))


@settings(max_examples=60)
@given(cases(), st.sampled_from(["float32", "float64"]), orders, st.sampled_from(["conv", "relu"]))
def test_convolution(case: Case, dtype: str, order: str, kind: str):
    check(case, dtype, order, kind)


@settings(max_examples=30)
@given(cases(), st.sampled_from(["float32", "float64"]), orders)
def test_convolution_with_relu_and_pooling(case: Case, dtype: str, order: str):
    if len(case.windows.out) == 2 and min(case.windows.out) > 1:
        check(case, dtype, order, "pool")


@settings(max_examples=30)
@given(cases(), st.sampled_from(ROUNDINGS), orders, st.sampled_from(["conv", "relu", "pool"]))
def test_factors_rounded_for_tensor_cores(case: Case, precision: str, order: str, kind: str):
    if kind != "pool" or (len(case.windows.out) == 2 and min(case.windows.out) > 1):
        check(case, "float32", order, kind, precision)


@settings(max_examples=25)
@given(
    cases(),
    st.sampled_from([("float32", word) for word in PRECISIONS] + [("float64", "float32")]),
    orders,
)
def test_transposed_convolution(case: Case, kind: tuple[str, str], order: str):
    """Its result is a convolution's dx, and its dx that convolution's result."""
    dtype, precision = kind
    windows, groups = case.windows, case.groups
    draw = np.random.default_rng(case.seed).standard_normal
    # The convolution behind it leads from case.c channels of windows.size to case.o of windows.out.
    x, weight = (
        draw((case.n, case.o, *windows.out)),
        draw((case.o, case.c // groups, *windows.kernel)),
    )
    dy, bias = draw((case.n, case.c, *windows.size)), draw(case.c)
    last = (*range(1, x.ndim), 0)
    with rigged(order, case.seed) as rig, use_precision(precision):
        x_, weight_, dy_ = rig.array(x, dtype, last), rig.array(weight, dtype), rig.array(dy, dtype)
        bias_ = rig.array(bias, dtype) if case.bias else None
        x, weight, dy = (rounded(a, factors_of(case, precision)) for a in (x_, weight_, dy_))
        shift = (
            0 if bias_ is None else np.asarray(bias_, "float64").reshape(-1, *[1] * (x.ndim - 2))
        )
        y, saved = cupy_conv.conv_transpose(x_, weight_, bias_, windows, groups, keep=True)
        zeros = np.zeros(dy.shape)
        wanted, terms = (
            gradients(zeros, *factors, windows, groups)[0]
            for factors in ((weight, x), map(np.abs, (weight, x)))
        )
        close(y, wanted + shift, dtype, terms + np.abs(shift).max())
        dx, dweight, dbias = cupy_conv.conv_transpose_backward(dy_, saved)
        sizes = np.abs(dy), np.abs(weight)
        close(
            dx,
            convolution(dy, weight, windows, groups),
            dtype,
            convolution(*sizes, windows, groups),
        )
        terms = gradients(*sizes, np.abs(x), windows, groups)[1]
        close(dweight, gradients(dy, weight, x, windows, groups)[1], dtype, terms)
        assert (dbias is None) == (bias_ is None)
        if dbias is not None:
            # no product, so not rounded
            dy, sums = np.asarray(dy_, "float64"), (0, *range(2, dy.ndim))
            close(dbias, dy.sum(sums), dtype, np.abs(dy).sum(sums))


@settings(max_examples=30)
@given(
    cases("conv of few channels in a group"),
    st.sampled_from(["float32", "float64"]),
    orders,
    st.sampled_from(["conv", "relu"]),
)
def test_few_channels_in_a_group(case: Case, dtype: str, order: str, kind: str):
    names = {name for name, *_ in check(case, dtype, order, kind)} - {"sum_partials"}
    assert names == {"group_forward", "group_weight_gradient", "group_input_gradient"}


@settings(max_examples=15)
@given(
    cases("conv of few channels in a group"),
    st.sampled_from(["float32", "float64"]),
    orders,
    st.sampled_from([(0.0, 6.0), (None, 1.0), (-1.0, None), (None, None)]),
    st.booleans(),
)
def test_few_channels_with_norm_and_limits(
    case: Case, dtype: str, order: str, limits: tuple[float | None, float | None], with_norm: bool
):
    x, weight, bias = numbers(case)
    low, high = limits
    draw = np.random.default_rng(case.seed + 2).random
    statistics = [draw(case.o) + 0.5 for _ in range(4)]
    with rigged(order, case.seed) as rig:
        x_, weight_ = rig.array(x, dtype, (*range(1, x.ndim), 0)), rig.array(weight, dtype)
        bias_ = None if bias is None else rig.array(bias, dtype)
        norm = ConvNorm(*(rig.array(a, dtype) for a in statistics), 1e-3) if with_norm else None
        y = cupy_conv.conv_unit(
            [x_], weight_, bias_, case.windows, case.groups, norm, low, high, None
        )
        x, weight = np.asarray(x_, "float64"), np.asarray(weight_, "float64")
        wanted = convolution(x, weight, case.windows, case.groups)
        terms = convolution(np.abs(x), np.abs(weight), case.windows, case.groups)
        column = (-1, *(1,) * (x.ndim - 2))
        if bias is not None:
            wanted += np.asarray(bias_, "float64").reshape(column)
            terms += np.abs(bias).max()
        if norm is not None:
            mean, var, scale, shift = (np.asarray(a, "float64").reshape(column) for a in norm[:4])
            scale = scale / np.sqrt(var + 1e-3)
            wanted, terms = (wanted - mean) * scale + shift, (terms + mean) * scale + shift
        wanted = wanted if low is None and high is None else np.clip(wanted, low, high)
        close(y, wanted, dtype, terms)
    assert [name for name, *_ in rig.launches] == ["group_forward"]


def test_what_the_unit_leaves_to_other_ops():
    """Sums, pooling, and groups of many channels."""
    with rigged() as rig:
        x = rig.array(np.ones((2, 10, 4, 4)), "float32")
        weight = rig.array(np.ones((10, 1, 1, 1)), "float32")
        many = rig.array(np.ones((10, 5, 1, 1)), "float32")
        windows, pool = Windows.of((4, 4), 1), Windows.of((4, 4), 2, 2)
        for parts, factor, groups, last, expected in (
            ([x, x], weight, 10, None, np.full((2, 10, 4, 4), 2.0)),
            ([x], weight, 10, pool, np.ones((2, 10, 2, 2))),
            ([x], many, 2, None, np.full((2, 10, 4, 4), 5.0)),
        ):
            made = cupy_conv.conv_unit(parts, factor, None, windows, groups, None, None, None, last)
            np.testing.assert_array_equal(made, expected)


def test_the_cells_of_a_depthwise_weight_are_shared_out():
    """Over enough blocks to fill a GPU, and their sums added up in one order."""
    case = Case(32, 8, 8, 8, Windows.of((20, 20), 3, 1, 1), True, 3)
    launches = check(case, "float32", "shuffled", "relu")
    grids = {name: grid for name, grid, _ in launches}
    assert grids["group_weight_gradient"][0] > 1
    assert "sum_partials" in grids


THREE = Case(3, 3, 130, 1, Windows.of((9, 8), 3, 1, 1), True, 5)
STRIDED = Case(
    6, 34, 34, 2, Windows.of((11, 10), (3, 2), (2, 3), ((1, 0), (2, 1)), (1, 2)), True, 6
)


@pytest.mark.parametrize("kind", ["conv", "pool"])
@pytest.mark.parametrize("case", [THREE, STRIDED], ids=["three", "strided"])
@pytest.mark.parametrize("tile", cupy_plan.WIDE_TILES)
def test_every_tile(tile: cupy_plan.Tile, case: Case, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(geometry, "wide_tile", lambda *_: tile)
    geometry.plan_of.cache_clear()
    try:
        check(case, "float32", "reverse", kind)
    finally:
        geometry.plan_of.cache_clear()


@pytest.mark.parametrize(
    ("case", "kind", "precision"),
    [*((THREE, "pool", word) for word in ROUNDINGS), (STRIDED, "conv", "tf32")],
    ids=[*ROUNDINGS, "strided"],
)
@pytest.mark.parametrize("tile", cupy_plan.WIDE_TILES)
def test_every_tile_on_tensor_cores(
    tile: cupy_plan.Tile, case: Case, kind: str, precision: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(geometry, "wide_tile", lambda *_: tile)
    geometry.plan_of.cache_clear()
    try:
        check(case, "float32", "reverse", kind, precision)
    finally:
        geometry.plan_of.cache_clear()


@pytest.mark.parametrize(
    ("case", "splits", "kind", "precision"),
    [
        *product((THREE, STRIDED), (1, 5), ("conv", "relu", "pool"), ("float32",)),
        *((STRIDED, 5, "relu", precision) for precision in ROUNDINGS),
    ],
)
@pytest.mark.parametrize("tile", cupy_plan.SPLIT_TILES)
def test_every_tile_of_the_weights_gradient(
    tile: cupy_plan.Tile,
    case: Case,
    splits: int,
    kind: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
):
    def chosen(m: int, n: int, depth: int, times: int) -> cupy_plan.Split:
        each = -(-depth // (8 * splits)) * 8
        return cupy_plan.Split(tile, -(-depth // each), each)

    monkeypatch.setattr(geometry, "split_tile", chosen)
    geometry.plan_of.cache_clear()
    try:
        launches = check(case, "float32", "shuffled", kind, precision)
    finally:
        geometry.plan_of.cache_clear()
    assert ("sum_partials" in [name for name, *_ in launches]) == (splits > 1)


@pytest.mark.parametrize("offset", [0, 1])
def test_arrays_may_begin_anywhere_in_memory(offset: int):
    """16 bytes are read at once only where all arrays are aligned to that; x here begins ``offset``
    values further on."""
    draw, windows = np.random.default_rng(0).standard_normal, Windows.of((6, 6), 3, 1, 1)
    x, weight = draw((16, 6, 6, 8)).astype("float32"), draw((5, 16, 3, 3)).astype("float32")
    with rigged() as rig:
        memory = rig.empty(x.size + offset, "float32")[offset:].reshape(x.shape)
        memory[...] = x
        assert (memory.ctypes.data % 16 == 0) == (offset == 0)
        assert vector(8, memory) == (1 if offset else 4)
        assert vector(6, memory) == 1
        placed = memory.transpose(3, 0, 1, 2)
        y, saved = cupy_conv.conv(placed, rig.array(weight, "float32"), None, windows, 1, keep=True)
        x, weight = x.transpose(3, 0, 1, 2).astype("float64"), weight.astype("float64")
        close(
            y,
            convolution(x, weight, windows, 1),
            "float32",
            convolution(np.abs(x), np.abs(weight), windows, 1),
        )
        dy = rig.array(draw(y.shape), "float32", (1, 2, 3, 0))
        dx, dweight, _ = cupy_conv.conv_backward(dy, saved)
        dy = np.asarray(dy, "float64")
        terms = gradients(np.abs(x), np.abs(weight), np.abs(dy), windows, 1)
        for got, right, size in zip(
            (dx, dweight), gradients(x, weight, dy, windows, 1), terms, strict=True
        ):
            close(got, right, "float32", size)


def test_how_many_launches():
    """Forward with bias, ReLU and pooling is one launch; its backward three."""
    launches = check(
        Case(8, 3, 16, 1, Windows.of((12, 12), 5), True, 0), "float32", "forward", "pool"
    )
    assert [name for name, *_ in launches] == [
        "conv_forward",
        "conv_weight_gradient",
        "sum_partials",
        "conv_input_gradient",
    ]


def run_by_itself(pool: Windows, size: tuple[int, ...]) -> None:
    """A convolution by ones of one tap, with ReLU and this pooling, against pooling in plain
    loops."""
    x = np.random.default_rng(2).standard_normal((3, 2, *size))
    weight = np.ones((1, 2, *[1] * len(size)))
    with rigged() as rig:
        x_, weight_ = rig.array(x, "float64"), rig.array(weight, "float64")
        y, saved = cupy_conv.conv_relu(x_, weight_, None, Windows.of(size, 1), 1, pool, keep=True)
        z, dz = np.maximum(x.sum(1, keepdims=True), 0), np.zeros((3, 1, *size))
        wanted = np.zeros((3, 1, *pool.out))
        for index in np.ndindex(wanted.shape):
            seen = {}
            for k in np.ndindex(pool.kernel):
                at = tuple(
                    o * s + i * d - before
                    for o, s, i, d, (before, _) in zip(
                        index[2:], pool.stride, k, pool.dilation, pool.pads, strict=True
                    )
                )
                if all(0 <= a < n for a, n in zip(at, size, strict=True)):
                    seen[at] = z[(*index[:2], *at)]
            best = max(seen, key=seen.get)
            wanted[index] = seen[best]
            dz[(*index[:2], *best)] += wanted[index] > 0
        close(y, wanted, "float64", wanted)
        dx, dweight, _ = cupy_conv.conv_backward(np.ones(wanted.shape), saved)
        close(dx, dz.repeat(2, 1), "float64", dz)
        sums, parts = (0, *range(2, x.ndim)), dz * x
        close(dweight, parts.sum(sums).reshape(weight.shape), "float64", np.abs(parts).sum(sums))


@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((7, 9), (3, 2, 1, 1, False)),
        ((7, 9), (2, 2, 0, 1, True)),  # hangs over
        ((8, 8), (2, 1, 0, 1, False)),
        ((8, 8), (2, 2, 0, 2, False)),
        ((8,), (2, 2, 0, 1, False)),
    ],
)
def test_other_pooling_runs_by_itself(size: tuple, geometry: tuple):
    run_by_itself(pool_windows(size, *geometry), size)


def test_of_equal_maxima_the_first_takes_the_gradient():
    with rigged() as rig:
        x, weight = (
            rig.array(np.ones((1, 1, 4, 4)), "float32"),
            rig.array(np.ones((1, 1, 1, 1)), "float32"),
        )
        y, saved = cupy_conv.conv_relu(
            x, weight, None, Windows.of((4, 4), 1), 1, Windows.of((4, 4), 2, 2), keep=True
        )
        dx, _, _ = cupy_conv.conv_backward(rig.array(np.ones(y.shape), "float32"), saved)
    np.testing.assert_array_equal(dx[0, 0], [[1, 0, 1, 0], [0] * 4, [1, 0, 1, 0], [0] * 4])


@pytest.mark.parametrize("pool", [None, Windows.of((4, 4), 2, 2)])
def test_nan_comes_through(pool: Windows | None):
    x = np.full((1, 1, 4, 4), -1.0)
    x[0, 0, 1, 0] = np.nan
    with rigged() as rig:
        x_, weight = rig.array(x, "float32"), rig.array(np.ones((1, 1, 1, 1)), "float32")
        y, _ = cupy_conv.conv_relu(x_, weight, None, Windows.of((4, 4), 1), 1, pool, keep=True)
    assert np.isnan(y).sum() == 1
    assert (y[~np.isnan(y)] == 0).all()


def test_the_same_bits_in_any_order():
    results = []
    for order in ("forward", "reverse", "shuffled"):
        x, weight, bias = numbers(STRIDED)
        with rigged(order, 1) as rig:
            x, weight, bias = (rig.array(a, "float32") for a in (x, weight, bias))
            y, saved = cupy_conv.conv_relu(x, weight, bias, STRIDED.windows, 2, None, keep=True)
            dy = rig.array(np.random.default_rng(0).standard_normal(y.shape), "float32")
            results.append([y, *cupy_conv.conv_backward(dy, saved)])
    for first, *others in zip(*results, strict=True):
        for other in others:
            np.testing.assert_array_equal(first, other)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 3, 4, 4, 4), "float32"), ((2, 3, 4, 4), "float16"), ((0, 3, 4, 4), "float32")],
    ids=["three axes", "half", "empty"],
)
def test_what_is_declined(shape: tuple, dtype: str):
    windows = Windows.of(shape[2:], 3)
    with rigged() as rig:
        x, weight = (
            rig.array(np.zeros(shape), dtype),
            rig.array(np.zeros((3, 3, *windows.kernel)), dtype),
        )
        assert cupy_conv.conv(x, weight, None, windows, 1, keep=True) is NotImplemented
        assert cupy_conv.conv_relu(x, weight, None, windows, 1, None, keep=True) is NotImplemented
        back = Windows.transposed(shape[2:], 3)
        assert cupy_conv.conv_transpose(x, weight, None, back, 1, keep=True) is NotImplemented
    assert not rig.launches


def test_what_32_bits_cannot_index_is_declined():
    windows = Windows.of((256, 256), 3, 1, 1)
    assert geometry.plan_of(windows, 64, 64, 1, 100, False, 4) is not None
    assert geometry.plan_of(windows, 64, 64, 1, 1000, False, 4) is None
    assert geometry.plan_of(Windows.of((8, 8), 3), 70000, 70000, 70000, 1, False, 4) is None
