"""The CUDA kernels of the affine map, run on the host, against products in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import linear as cupy_linear
from portacnn.backends.cupy.plan import SPLIT_TILES, Split, Tile
from portacnn.ops.dispatch import PRECISIONS, use_precision
from support.cuda_rig import Rig, close, needs_compiler, orders, rigged, rounded
from support.drawing import arguments_of

pytestmark = needs_compiler

layouts = st.sampled_from(["rows", "columns", "apart"])


def matrix(rig: Rig, host: np.ndarray, dtype: str, layout: str) -> np.ndarray:
    """Its rows together in memory, or its columns, or every second number."""
    if layout == "apart":
        wide = np.full((len(host), host.shape[1] * 2), 7.0)
        wide[:, ::2] = host
        return rig.array(wide, dtype)[:, ::2]
    return rig.array(host, dtype, (0, 1) if layout == "rows" else (1, 0))


def check(
    n: int,
    f: int,
    o: int,
    bias: bool,
    relu: bool,
    dtype: str,
    order: str,
    seed: int,
    x_in: str,
    dy_in: str,
    precision: str = "float32",
) -> list:
    """precision: what factors are rounded to. Gives the launches."""
    draw = np.random.default_rng(seed).standard_normal
    with rigged(order, seed) as rig, use_precision(precision):
        x, weight = matrix(rig, draw((n, f)), dtype, x_in), rig.array(draw((o, f)), dtype)
        shift = rig.array(draw(o), dtype) if bias else None
        dy = matrix(rig, draw((n, o)), dtype, dy_in)
        op = cupy_linear.linear_relu if relu else cupy_linear.linear
        y, saved = op(x, weight, shift, keep=True)
        assert op(x, weight, shift, keep=False)[1] is None
        x64, weight64, dz = (rounded(a, precision) for a in (x, weight, dy))
        wanted = x64 @ weight64.T + (0 if shift is None else np.asarray(shift, "float64"))
        if relu:
            dz, wanted = np.where(wanted > 0, dz, 0), np.maximum(wanted, 0)
        x_size, weight_size, dz_size = np.abs(x64), np.abs(weight64), np.abs(dz)
        close(y, wanted, dtype, x_size @ weight_size.T + (0 if shift is None else np.abs(shift)))
        dx, dweight, dbias = cupy_linear.linear_backward(dy, saved)
        close(dx, dz @ weight64, dtype, dz_size @ weight_size)
        close(dweight, dz.T @ x64, dtype, dz_size.T @ x_size)
        if bias:
            close(dbias, dz.sum(0), dtype, dz_size.sum(0))
        else:
            assert dbias is None
        assert cupy_linear.linear_backward(dy, saved, need_dx=False)[0] is None
    return rig.launches


def sizes(arguments: dict) -> tuple[int, int, int, bool]:
    """N, F, O, and whether there is a bias."""
    return *arguments["x"].shape, len(arguments["weight"]), arguments["bias"] is not None


@settings(max_examples=20)
@given(
    arguments_of("linear", "small"),
    st.booleans(),
    st.sampled_from(["float32", "float64"]),
    orders,
    st.integers(0, 99),
    layouts,
    layouts,
)
def test_affine_map(arguments, relu, dtype, order, seed, x_in, dy_in):
    check(*sizes(arguments), relu, dtype, order, seed, x_in, dy_in)


@settings(max_examples=20)
@given(
    arguments_of("linear", "small"),
    st.booleans(),
    st.sampled_from(PRECISIONS[1:]),
    orders,
    st.integers(0, 99),
    layouts,
)
def test_factors_rounded_for_tensor_cores(arguments, relu, precision, order, seed, layout):
    n, f, o, _ = sizes(arguments)
    check(n, f, o, True, relu, "float32", order, seed, layout, "rows", precision)


@pytest.mark.parametrize("tile", SPLIT_TILES)
@pytest.mark.parametrize(
    ("splits", "precision"), [(1, "float32"), *((3, precision) for precision in PRECISIONS)]
)
def test_every_tile(tile: Tile, splits: int, precision: str, monkeypatch: pytest.MonkeyPatch):
    def chosen(m: int, n: int, depth: int, times: int) -> Split:
        each = -(-depth // (8 * splits)) * 8
        return Split(tile, -(-depth // each), each)

    monkeypatch.setattr(cupy_linear, "split_tile", chosen)
    launches = check(
        70, 90, 130, True, True, "float32", "shuffled", 1, "columns", "rows", precision
    )
    # the forward ran twice
    assert [name for name, *_ in launches].count("sum_partials") == (0 if splits == 1 else 5)


def test_the_tutorials_layer_fills_the_device():
    launches = check(100, 4320, 100, True, True, "float32", "forward", 0, "columns", "columns")
    blocks = [np.prod(grid) for name, grid, _ in launches if name == "gemm"]
    assert min(blocks) >= 100


def test_the_same_bits_in_any_order():
    results = []
    for order in ("forward", "shuffled"):
        with rigged(order, 3) as rig:
            draw = np.random.default_rng(0).standard_normal
            x, weight, dy = (
                rig.array(draw(shape), "float32") for shape in ((40, 300), (50, 300), (40, 50))
            )
            y, saved = cupy_linear.linear_relu(x, weight, None, keep=True)
            results.append([y, *cupy_linear.linear_backward(dy, saved)[:2]])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def affine(
    word: str, dtype: str = "float32", capability: str = "90", backward_word: str | None = None
) -> list:
    """An affine map with this precision, and its backward."""
    with rigged(capability=capability) as rig:
        draw = np.random.default_rng(0).standard_normal
        x, weight, dy = (rig.array(draw(shape), dtype) for shape in ((9, 30), (7, 30), (9, 7)))
        with use_precision(word):
            y, saved = cupy_linear.linear(x, weight, None, keep=True)
        with use_precision(backward_word or word):
            return [y, *cupy_linear.linear_backward(dy, saved)[:2]]


def same(one: list, other: list) -> list[bool]:
    return [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_what_precision_leaves_alone(precision: str):
    """Doubles, and devices whose tensor cores have no such factors; to the bit."""
    assert all(same(affine(precision, "float64"), affine("float32", "float64")))
    assert all(same(affine(precision, capability="75"), affine("float32")))
    assert not any(same(affine(precision, capability="80"), affine("float32")))


@settings(max_examples=15)
@given(
    st.integers(1, 40),
    st.sampled_from([1, 8, 16, 33, 300]),
    st.integers(1, 40),
    st.integers(0, 99),
    st.booleans(),
)
def test_three_products_of_tf32_are_as_exact_as_stated(
    n: int, f: int, o: int, seed: int, alike: bool
):
    """Each product is off by at most 3 * 2**-22 of itself, beside what adding up in float32 costs.
    ``alike``: all of a sign."""
    draw = np.random.default_rng(seed).standard_normal
    x, weight = draw((n, f)) * 2.0 ** np.arange(n)[:, None], draw((o, f))
    x, weight = (np.abs(a).astype("float32") if alike else a.astype("float32") for a in (x, weight))
    errors = {}
    for precision in ("3xtf32", "tf32"):
        with rigged(order="shuffled") as rig, use_precision(precision):
            y, _ = cupy_linear.linear(
                rig.array(x, "float32"), rig.array(weight, "float32"), None, keep=False
            )
        terms = np.abs(x).astype("float64") @ np.abs(weight).T.astype("float64")
        errors[precision] = np.abs(y - x.astype("float64") @ weight.T.astype("float64")) / terms
    sums = 3 * f * 2.0**-24  # three sums for each product, each rounded to the nearest
    assert errors["3xtf32"].max() <= 3 * 2.0**-22 + sums
    if (alike or f == 1) and n * o >= 64:  # of few values, TF32's own error may be small by chance
        assert errors["3xtf32"].max() < errors["tf32"].max() / 30


def test_what_is_not_finite_stays_so_through_three_products_of_tf32():
    x = np.array([[np.inf, 1.0], [np.nan, 1.0], [3e38, 0.0]])
    with rigged() as rig, use_precision("3xtf32"):
        y, _ = cupy_linear.linear(
            rig.array(x, "float32"), rig.array(np.ones((1, 2)), "float32"), None, keep=False
        )
    assert not np.isfinite(y[:2]).any()
    np.testing.assert_allclose(y[2, 0], np.float32(3e38), rtol=1e-6)


def test_forward_and_backward_look_at_the_precision_when_they_run():
    plain, rough, mixed = (
        affine("float32"),
        affine("bfloat16"),
        affine("float32", backward_word="bfloat16"),
    )
    assert same(mixed, plain) == [True, False, False]
    assert same(mixed, rough) == [False, True, True]


def test_nan_comes_through_relu():
    with rigged() as rig:
        x, weight = (
            rig.array(np.array([[1.0, np.nan]]), "float32"),
            rig.array(np.ones((3, 2)), "float32"),
        )
        assert np.isnan(cupy_linear.linear_relu(x, weight, None, keep=False)[0]).all()


@pytest.mark.parametrize("dtype", ["float16", "int32"])
def test_other_dtypes_are_declined(dtype: str):
    with rigged() as rig:
        x, weight = rig.array(np.ones((2, 3)), dtype), rig.array(np.ones((4, 3)), dtype)
        assert cupy_linear.linear(x, weight, None, keep=True) is NotImplemented


def test_an_empty_batch_is_declined():
    with rigged() as rig:
        x, weight = rig.array(np.ones((0, 3)), "float32"), rig.array(np.ones((4, 3)), "float32")
        assert cupy_linear.linear(x, weight, None, keep=True) is NotImplemented
