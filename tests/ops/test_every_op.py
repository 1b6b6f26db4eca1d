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
from portacnn.ops.dispatch import OPS
from portacnn.runtime import resolve
from portacnn.testing.examples import (
    EXAMPLES,
    Arguments,
    Example,
    Random,
    Shapes,
    arrays_of,
    as_given,
    call,
    mapped,
)
from portacnn.testing.op_checks import check_example
from support.checks import choices, pieces_for, refuses
from support.matrix import EACH_LIBRARY, Here, needs

NUMPY = Here("numpy", resolve("numpy"))
EVERY = {name: example for name, example in EXAMPLES.items() if example.small}
names = pytest.mark.parametrize("name", EVERY)


def test_every_op_has_an_example():
    """Put a row for it into portacnn/testing/examples.py."""
    forwards = {name for name in ops.__all__ if not name.endswith("_backward")}
    public = forwards - {"Cache", "use_kernels", "use_precision"}
    assert {example.op for example in EXAMPLES.values()} == public | set(OPS)
    assert {example.op for example in EVERY.values()} == public


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


def drawn(shapes: Shapes, seed: int = 0) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """Numbers from 0.5 to 1.5, with distinct maxima; matrices of weights such that products are of
    that size too."""
    rng = np.random.default_rng(seed)

    def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = rng.uniform(0.5, 1.5, shape)
        if name == "weight" and array.ndim > 1:
            array /= max(array.shape[0], array[0].size)
        return array

    return values


def sized(
    example: Example, change: Callable[[np.ndarray], Any], shapes: Shapes | None = None
) -> Arguments:
    """Arguments of the small shapes, or of others, with ``change`` done to the arrays of floats."""
    shapes = shapes or example.small
    return as_given(example.of_shapes(shapes, drawn(shapes)), change)


def results(here: Here, example: Example, arguments: Arguments) -> list[np.ndarray]:
    found = example.results(mapped(arguments, here.array))
    return [here.host(array) for array in found]


# --- drawn examples -------------------------------------------------------------------------------


def gradient(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_normal(shape))


KINKED = {"relu", "max_pool", "conv_relu", "linear_relu", "add_relu", "adaptive_max_pool"}
KINKED |= {"global_max_pool", *(f"{a}max_pool{n}d" for n in (1, 2, 3) for a in ("", "adaptive_"))}
"""Their examples have ties, or inputs at 0, where there is no slope."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", [n for n, example in EXAMPLES.items() if example.differentiable])
def test_the_gradient_is_the_slope(name: str, seed: int):
    """In float64, along a random direction of all differentiable arguments together."""
    example = EXAMPLES[name]
    given = example.draw(Random(seed, "small"))
    if example.op in KINKED:
        given = as_given(given, lambda array: array + gradient(array.shape, 7) / 100)
    names = [word for word in example.differentiable if given.get(word) is not None]
    towards = {w: mapped(given[w], lambda array: gradient(array.shape, seed)) for w in names}

    def at(t: float) -> Any:
        moved = {
            word: [a + t * b for a, b in zip(given[word], towards[word], strict=True)]
            if isinstance(given[word], list)
            else given[word] + t * towards[word]
            for word in names
        }
        return call(example.forward, {**mapped({**given, **moved}, np.copy), "keep": True})

    with use_kernels("reference"):
        y, cache = at(0.0)
        dy = gradient(y.shape, seed + 1) if y.ndim else 1.3
        found = example.backward(dy, cache)
        slope = np.sum((at(1e-6)[0] - at(-1e-6)[0]) * dy) / 2e-6
    gradients = found if isinstance(found, tuple) else (found,)
    shares = []
    for word, one in zip(example.differentiable, gradients, strict=True):
        assert (one is None) == (word not in names)
        # an op of a list has one gradient for all
        shares += [one * direction for direction in arrays_of([towards.get(word)])]
    total = sum(np.sum(share) for share in shares)
    assert abs(slope - total) < 1e-6 * (1.0 + sum(np.abs(share).sum() for share in shares))


@EACH_LIBRARY
@pytest.mark.parametrize("name", EXAMPLES)
def test_figures_on_every_backend(backend: Here, name: str):
    """As PyTorch's figures and those of loops; larger ones as the portable op on NumPy in float64.
    NumPy's inputs are read-only."""
    check_example(backend.backend, name)


# --- half precision -------------------------------------------------------------------------------


@names
@pytest.mark.parametrize(
    ("library", "dtype"),
    [
        ("numpy", "float16"),
        *(pytest.param("torch", kind, marks=needs("torch")) for kind in ("float16", "bfloat16")),
    ],
)
def test_sums_of_half_precision_are_made_in_float32(name: str, library: str, dtype: str):
    home, example = resolve(library), EVERY[name]
    xp, half = home.xp, getattr(home.xp, dtype)

    def rounded(array: np.ndarray) -> Any:
        return xp.astype(home.asarray(array), half)

    host = example.sized("long", drawn(example.long))
    found = example.results(mapped(as_given(host, rounded), home.asarray))
    wide = as_given(host, lambda array: home.to_host(xp.astype(rounded(array), xp.float64)))
    with use_kernels("reference"):
        expected = example.results(wide)
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


@needs("torch")
def test_floats_of_eight_bits_are_refused():
    import torch

    refuses(
        ArrayError,
        "floating point",
        "float8",
        call=lambda: ops.relu(torch.zeros(2, dtype=torch.float8_e4m3fn)),
    )


# --- caches ---------------------------------------------------------------------------------------


@names
def test_a_cache_is_not_used_up(backend: Here, name: str):
    """The backward pass gives the same once more, to the bit."""
    example = EVERY[name]
    if (backward := example.backward) is None:
        return
    for choice in choices(backend):
        with use_kernels(choice):
            arguments = mapped(
                sized(example, lambda a: a.astype("float64")), backend.backend.asarray
            )
            y, cache = call(example.forward, {**arguments, "keep": True})
            expected = [backend.host(array) for array in arrays_of(backward(y, cache))]
            again = [backend.host(array) for array in arrays_of(backward(y, cache))]
            for got, right in zip(again, expected, strict=True):
                np.testing.assert_array_equal(got, right)


# --- byte order -----------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_byte_order(name: str, dtype: str):
    example = EVERY[name]
    for choice in choices(NUMPY):
        with use_kernels(choice):
            expected = example.results(sized(example, lambda a: a.astype(dtype)))
            swapped = sized(example, lambda a: a.astype(f">{dtype}"))
            found = example.results(swapped)
        written = {id(array) for array in arrays_of(list(swapped.values()))}
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
    here, example = Here(library, resolve(library)), EVERY[name]
    for seed in range(3):
        rng = np.random.default_rng(seed)

        def extremes(_: str, shape: tuple[int, ...]) -> np.ndarray:
            return rng.choice(EXTREMES if seed else EXTREMES[3:], shape)  # noqa: B023

        host = example.sized("small", extremes)
        with np.errstate(all="ignore"):
            host = as_given(host, lambda a: a.astype("float32"))
        for choice in choices(here):
            with use_kernels(choice), pieces_for(2):
                quiet = results(here, example, mapped(host, np.copy))
                with everything_raises():
                    found = results(here, example, mapped(host, np.copy))
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
    example = EVERY[name]
    for choice in choices(NUMPY):
        with use_kernels(choice):
            expected = example.results(sized(example, lambda a: a.astype("f4")))
            laid = sized(example, lambda a: MEMORY[memory](a.astype("f4")))
            found = example.results(laid)
        for got, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(got, right, rtol=1e-5, atol=1e-6)


@names
def test_no_samples(name: str):
    """An empty batch gives an empty result, or an error of ours."""
    example = EVERY[name]
    first, *_ = example.small
    shapes = {word: nothing_of(shape) for word, shape in example.small.items()}
    if not isinstance(shapes[first], list):
        shapes = {**example.small, **{w: shapes[w] for w in (first, "target") if w in shapes}}
    for choice in choices(NUMPY):
        with use_kernels(choice), everything_raises():
            try:
                example.results(sized(example, lambda a: a.astype("f4"), shapes))
            except PortacnnError:
                continue


def nothing_of(shape: Any) -> Any:
    return [nothing_of(s) for s in shape] if isinstance(shape, list) else (0, *shape[1:])


# --- what is refused ------------------------------------------------------------------------------


@names
def test_arrays_that_mean_something_else(name: str):
    example = EVERY[name]
    first, *_ = example.small
    arguments = sized(example, lambda a: a.astype("f4"))
    several = isinstance(arguments[first], list)

    def refused(*words: str, change: Callable[[np.ndarray], Any]) -> None:
        changed = [change(arguments[first][0])] if several else change(arguments[first])
        wrong = {**arguments, first: changed}
        refuses(ArrayError, *words, call=lambda: example.results(wrong))

    refused("MaskedArray", "filled", change=lambda a: np.ma.masked_greater(a, 1.0))
    if example.integers or "params" in arguments or "grads" in arguments:
        return  # those take integers too, or what a Trainer has made itself
    refused("floating point", "object", change=lambda a: a.astype(object))
    refused("floating point", change=lambda a: np.zeros(a.shape, dtype=[("value", "f4")]))


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_a_matrix_is_refused():
    x = np.matrix([[1.0]])
    refuses(ArrayError, "matrix", "numpy.asarray", call=lambda: ops.relu(x))
