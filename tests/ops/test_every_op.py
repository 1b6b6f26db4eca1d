"""What holds of every op alike: half precision, byte order, no warnings, any memory, no subclass
that means something else."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ArrayError, PortacnnError
from portacnn.ops import use_kernels
from portacnn.runtime import resolve
from support.checks import choices, pieces_for, refuses
from support.every_op import EVERY, Case, Shapes
from support.matrix import Here

NUMPY = Here("numpy", resolve("numpy"))
names = pytest.mark.parametrize("name", EVERY)


def test_every_op_is_here():
    """Put how it is called into EVERY."""
    forwards = {name for name in ops.__all__ if not name.endswith("_backward")}
    assert forwards - {"Cache", "use_kernels", "use_precision", "col2im"} == {
        case.op for case in EVERY.values()
    }


def test_a_wrong_call_is_refused_in_the_name_of_the_op():
    """And not of the function inside that found it out."""
    x = NUMPY.array(np.ones((1, 2, 4, 4), np.float32))
    for name in ops.__all__:
        if name in ("Cache", "use_kernels", "use_precision") or name.endswith("_backward"):
            continue
        with pytest.raises(TypeError, match=rf"^{name}\(\) "):
            getattr(ops, name)(x, colour=1)
    with pytest.raises(TypeError, match=r"^conv2d\(\) got an unexpected keyword argument 'colour'"):
        ops.conv2d(x, x, colour=1)
    y, cache = ops.relu(x)
    with pytest.raises(TypeError, match=r"^relu_backward\(\) got an unexpected keyword argument"):
        ops.relu_backward(y, cache, colour=1)


def drawn(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers from 0.5 to 1.5, with distinct maxima; matrices of weights such that products are of
    that size too."""
    rng = np.random.default_rng(seed)
    arrays = {name: rng.uniform(0.5, 1.5, shape) for name, shape in shapes.items()}
    for name, array in arrays.items():
        if name == "weight" and array.ndim > 1:
            array /= max(array.shape[0], array[0].size)
    return arrays


def results(here: Here, case: Case, arrays: dict[str, Any]) -> list[np.ndarray]:
    return [here.host(array) for array in case.run(here, arrays)]


# --- half precision -------------------------------------------------------------------------------


@names
@pytest.mark.parametrize(
    ("library", "dtype"), [("numpy", "float16"), ("torch", "float16"), ("torch", "bfloat16")]
)
def test_sums_of_half_precision_are_made_in_float32(name: str, library: str, dtype: str):
    if library == "torch":
        pytest.importorskip("torch")
    home, case = resolve(library), EVERY[name]
    xp, half = home.xp, getattr(home.xp, dtype)
    given = {word: xp.astype(home.asarray(host), half) for word, host in drawn(case.long).items()}
    rounded = {word: home.to_host(xp.astype(array, xp.float64)) for word, array in given.items()}
    found = case.run(Here(library, home), given)
    with use_kernels("reference"):
        expected = case.run(NUMPY, rounded)
    assert len(found) == len(expected)
    step = 2.0**-10 if dtype == "float16" else 2.0**-7
    for got, right in zip(found, expected, strict=True):
        if right.dtype.kind != "f":
            np.testing.assert_array_equal(home.to_host(got), right)
            continue
        assert got.dtype == half
        # what is left of dx is the rounding of dy
        size = np.abs(right).max() + float("norm" in name)
        np.testing.assert_allclose(
            home.to_host(xp.astype(got, xp.float64)), right, rtol=0, atol=16 * step * size + 1e-6
        )


def test_the_loss_of_many_zeros_in_float16():
    loss, cache = ops.softmax_cross_entropy(
        np.zeros((65520, 2), np.float16), np.zeros(65520, np.int64)
    )
    assert loss.dtype == np.float16
    assert float(loss) == pytest.approx(np.log(2), abs=5e-4)
    gradient = ops.softmax_cross_entropy_backward(1.0, cache)
    assert gradient.dtype == np.float16
    # a step of float16 there
    np.testing.assert_allclose(gradient, [[-0.5 / 65520, 0.5 / 65520]] * 65520, atol=6e-8)


def test_floats_of_eight_bits_are_refused():
    torch = pytest.importorskip("torch")
    refuses(
        ArrayError,
        "floating point",
        "float8",
        call=lambda: ops.relu(torch.zeros(2, dtype=torch.float8_e4m3fn)),
    )


# --- byte order -----------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_byte_order(name: str, dtype: str):
    case = EVERY[name]
    for choice in choices(NUMPY):
        with use_kernels(choice):
            expected = case.run(
                NUMPY, {word: host.astype(dtype) for word, host in drawn(case.small).items()}
            )
            swapped = {word: host.astype(f">{dtype}") for word, host in drawn(case.small).items()}
            found = case.run(NUMPY, dict(swapped))
        written = {id(array) for array in swapped.values()}
        for got, right in zip(found, expected, strict=True):
            assert got.dtype.isnative or id(got) in written
            np.testing.assert_array_equal(got, right, strict=got.dtype.isnative)


def test_a_gradient_of_foreign_byte_order():
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    y, cache = ops.tanh(x)
    np.testing.assert_array_equal(
        ops.tanh_backward(y.astype(">f4"), cache), ops.tanh_backward(y, cache)
    )
    refuses(
        ArrayError, "linear", "byte order", "native", call=lambda: ops.linear(x.astype(">f4"), x)
    )


# --- warnings -------------------------------------------------------------------------------------

EXTREMES = (
    np.inf,
    -np.inf,
    np.nan,
    0.0,
    -0.0,
    3e38,
    -3e38,
    1e-45,
    1e30,
    -1e30,
    1e-30,
    1000.0,
    -1000.0,
    1.0,
)


@contextmanager
def everything_raises() -> Iterator[None]:
    """Whatever NumPy has to say of a number is an error, in this thread and in others; and it is
    still so afterwards."""
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        before = np.geterr()
        yield
        assert np.geterr() == before


@names
@pytest.mark.parametrize("library", ["numpy", "array_api_strict"])
def test_no_warnings(name: str, library: str):
    if library == "array_api_strict":
        pytest.importorskip(library)
    here, case = Here(library, resolve(library)), EVERY[name]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        values = {
            word: rng.choice(EXTREMES if seed else EXTREMES[3:], shape)
            for word, shape in case.small.items()
        }
        with np.errstate(all="ignore"):
            hosts = {word: host.astype("float32") for word, host in values.items()}
        for choice in choices(here):
            with use_kernels(choice), pieces_for(2):
                quiet = results(
                    here, case, {word: here.array(host) for word, host in hosts.items()}
                )
                with everything_raises():
                    found = results(
                        here, case, {word: here.array(host) for word, host in hosts.items()}
                    )
            for got, right in zip(found, quiet, strict=True):
                np.testing.assert_array_equal(got, right)


# --- memory ---------------------------------------------------------------------------------------


def _negative(array: np.ndarray) -> np.ndarray:
    return np.flip(np.flip(array).copy())


def _stepped(array: np.ndarray) -> np.ndarray:
    wide = np.full([2 * n for n in array.shape], 99, array.dtype)
    wide[tuple(slice(None, None, 2) for _ in array.shape)] = array
    return wide[tuple(slice(None, None, 2) for _ in array.shape)]


def _unaligned(array: np.ndarray) -> np.ndarray:
    place = np.frombuffer(bytearray(array.nbytes + 1), dtype=np.uint8)[1:].view(array.dtype)
    place = place.reshape(array.shape)
    place[...] = array
    return place


class Own(np.ndarray):
    """A subclass that adds nothing but its name."""


MEMORY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Fortran": np.asfortranarray,
    "negative strides": _negative,
    "stepped": _stepped,
    "unaligned": _unaligned,
    "own subclass": lambda array: array.view(Own),
}


@names
@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory(name: str, memory: str):
    case = EVERY[name]
    for choice in choices(NUMPY):
        with use_kernels(choice):
            expected = case.run(
                NUMPY, {word: host.astype("f4") for word, host in drawn(case.small).items()}
            )
            laid = {
                word: MEMORY[memory](host.astype("f4")) for word, host in drawn(case.small).items()
            }
            found = case.run(NUMPY, laid)
        for got, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


@names
def test_no_samples(name: str):
    """An empty batch gives an empty result, or an error of ours."""
    case = EVERY[name]
    first, *_ = case.small
    batched = case.small if first == "p" else (first, "target")
    shapes = {
        word: (0, *shape[1:]) if word in batched else shape for word, shape in case.small.items()
    }
    for choice in choices(NUMPY):
        with use_kernels(choice), everything_raises():
            try:
                case.run(NUMPY, {word: host.astype("f4") for word, host in drawn(shapes).items()})
            except PortacnnError:
                continue


# --- what is refused ------------------------------------------------------------------------------


@names
def test_arrays_that_mean_something_else(name: str):
    case = EVERY[name]
    first, *_ = case.small
    arrays = {word: host.astype("f4") for word, host in drawn(case.small).items()}
    masked = {**arrays, first: np.ma.masked_greater(arrays[first], 1.0)}
    refuses(ArrayError, "MaskedArray", "filled", call=lambda: case.run(NUMPY, masked))
    if case.op in ("take_batch", "im2col", "is_correct", "all_finite") or first == "p":
        return  # those take integers too, or what a Trainer has made itself
    objects = {**arrays, first: arrays[first].astype(object)}
    refuses(ArrayError, "floating point", "object", call=lambda: case.run(NUMPY, objects))
    records = {**arrays, first: np.zeros(arrays[first].shape, dtype=[("value", "f4")])}
    refuses(ArrayError, "floating point", call=lambda: case.run(NUMPY, records))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_is_refused():
    x = np.matrix([[1.0]])
    refuses(ArrayError, "matrix", "numpy.asarray", call=lambda: ops.relu(x))
