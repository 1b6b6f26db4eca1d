"""Batches out of a set of images, against plain loops: which images, which numbers, and how they
lie in memory."""

from fractions import Fraction
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends import threads
from portacnn.errors import ArgumentError, ArrayError, ShapeError
from portacnn.ops import take_batch
from portacnn.runtime import resolve
from support import oracles
from support.checks import DTYPES, LAYOUTS, agree, laid_out, refuses, untouched, with_each_kernel
from support.matrix import Here, backends

MEAN, STD = (30.5, 127.0, 0.25), (255.0, 64.0, 77.7)


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@oracles.remembered
def by_loops(
    images: np.ndarray, indices: list[int], mean: tuple, std: tuple, dtype: str
) -> np.ndarray:
    """Every pixel by itself, in fractions, from mean and std as this dtype holds them."""
    y = np.empty((len(indices), *images.shape[1:]))
    for (b, c, *s), _ in np.ndenumerate(y):
        m, d = (Fraction(float(np.dtype(dtype).type(value[c]))) for value in (mean, std))
        y[(b, c, *s)] = (int(images[(indices[b], c, *s)]) - m) / d
    return y


def column(here: Here, values: tuple, ndim: int, dtype: str):
    return here.array(np.array(values).reshape(len(values), *(1,) * (ndim - 2)), dtype)


@pytest.mark.parametrize(
    "shape", [(5, 3), (5, 3, 4), (5, 3, 4, 3), (4, 3, 2, 3, 2), (3, 1, 2, 2), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@with_each_kernel
def test_values_agree_with_loops(backend: Here, shape, layout, dtype):
    host, channels = pixels(*shape), shape[1]
    images = laid_out(backend, host, layout=layout)
    mean, std = (column(backend, values[:channels], len(shape), dtype) for values in (MEAN, STD))
    last = shape[0] - 1
    for chosen in ([last, 0, last // 2, 0], [0], list(range(shape[0]))):
        indices = backend.array(np.array(chosen))
        with untouched(backend, images, indices, mean, std):
            agree(
                backend,
                take_batch(images, indices, mean, std),
                by_loops(host, chosen, MEAN, STD, dtype),
                std,
            )
            zero = by_loops(host, chosen, (0, 0, 0), STD, dtype)
            agree(backend, take_batch(images, indices, None, std), zero, std)
    whole = by_loops(host, list(range(shape[0])), MEAN, STD, dtype)
    agree(backend, take_batch(images, None, mean, std), whole, std)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@with_each_kernel
def test_floats_are_gathered_as_they_are(backend: Here, layout, dtype):
    host = np.random.default_rng(0).random((5, 2, 3, 4)).astype(dtype)
    images = laid_out(backend, host, layout=layout)
    with untouched(backend, images):
        agree(
            backend,
            take_batch(images, backend.array(np.array([4, 1, 1]))),
            host[[4, 1, 1]],
            images,
            0.0,
        )
        agree(backend, take_batch(images), host, images, 0.0)


@settings(max_examples=40)
@given(
    shape=st.tuples(*[st.integers(1, 6)] * 4),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@with_each_kernel
def test_drawn_arguments_agree_with_the_reference(backend: Here, shape, layout, dtype, data):
    n, channels, *_ = shape
    host = pixels(*shape, seed=n)
    chosen = data.draw(st.lists(st.integers(0, n - 1), max_size=7))
    numbers = st.lists(st.floats(1, 300, width=32), min_size=channels, max_size=channels).map(tuple)
    mean, std = data.draw(numbers), data.draw(numbers)
    y = take_batch(
        laid_out(backend, host, layout=layout),
        backend.array(np.array(chosen, dtype="int64")),
        column(backend, mean, 4, dtype),
        column(backend, std, 4, dtype),
    )
    agree(backend, y, by_loops(host, chosen, mean, std, dtype), column(backend, std, 4, dtype))


@with_each_kernel
def test_every_value_to_the_bit(backend: Here):
    """As x / 255 and (x - mean) / std in NumPy's float32: subtraction and division rounded once
    each, everywhere."""
    host = np.arange(256, dtype="uint8").reshape(4, 1, 8, 8)
    images, indices = backend.array(host), backend.array(np.arange(4))
    std = column(backend, (255,), 4, "float32")
    expected = host.astype("float32") / np.float32(255)
    assert backend.host(take_batch(images, indices, None, std)).tobytes() == expected.tobytes()
    mean, std = column(backend, (33.3285,), 4, "float32"), column(backend, (78.5655,), 4, "float32")
    expected = (host.astype("float32") - np.float32(33.3285)) / np.float32(78.5655)
    assert backend.host(take_batch(images, indices, mean, std)).tobytes() == expected.tobytes()


@backends(having="strides")
@with_each_kernel
def test_a_batch_lies_as_the_backend_prefers(backend: Here):
    images, floats = (
        backend.array(pixels(6, 3, 4, 5)),
        backend.array(np.ones((6, 3, 4, 5)), "float32"),
    )
    indices, std = backend.array(np.array([5, 0])), column(backend, STD, 4, "float32")
    order = (1, 2, 3, 0) if backend.backend.layout == "batch_last" else (0, 1, 2, 3)
    for y in (
        take_batch(images, indices, None, std),
        take_batch(images, None, None, std),
        take_batch(floats, indices),
    ):
        lying = backend.xp.permute_dims(y, order)
        strides = lying.strides if hasattr(lying, "strides") else [4 * s for s in lying.stride()]
        assert list(strides) == [4 * prod(lying.shape[i + 1 :]) for i in range(4)]


@pytest.mark.parametrize("pieces", [2, 3])
def test_the_number_of_threads_changes_no_bit(monkeypatch, pieces):
    images, indices = pixels(7, 3, 5, 4), np.array([6, 2, 2, 0])
    mean, std = (np.array(values, "float32").reshape(3, 1, 1) for values in (MEAN, STD))
    expected = take_batch(images, indices, mean, std)
    monkeypatch.setattr(threads, "WORTH", 1)
    monkeypatch.setattr(threads, "thread_count", lambda: pieces)
    assert take_batch(images, indices, mean, std).tobytes() == expected.tobytes()


@with_each_kernel
def test_an_empty_set_is_accepted(backend: Here):
    std = column(backend, STD, 4, "float32")
    none = backend.array(np.zeros(0, "int64"))
    assert take_batch(backend.array(pixels(5, 3, 2, 2)), none, None, std).shape == (0, 3, 2, 2)
    assert take_batch(backend.array(pixels(0, 3, 2, 2)), None, None, std).shape == (0, 3, 2, 2)


def test_what_does_not_fit(backend: Here):
    images, floats = (
        backend.array(pixels(5, 3, 2, 2)),
        backend.array(np.zeros((5, 3, 2, 2)), "float32"),
    )
    indices, std = backend.array(np.arange(3)), column(backend, STD, 4, "float32")

    def refused(kind, *words, case):
        refuses(kind, "take_batch: ", *words, call=lambda: take_batch(*case))

    refused(ArrayError, "images must be floating point", "uint8", case=(images, indices))
    refused(
        ArrayError,
        "must be uint8 if std is given, got 5x3x2x2",
        "float32",
        case=(floats, indices, None, std),
    )
    for kind in ("int8", "int32", "int64", "bool"):
        refused(
            ArrayError,
            "must be uint8",
            kind,
            case=(backend.array(pixels(5, 3, 2, 2), kind), None, None, std),
        )
    for wrong in (
        backend.array(np.zeros(3)),
        backend.array(np.zeros(3, bool)),
        backend.array(np.zeros((3, 1), int)),
    ):
        refused(ArrayError, "indices must be integers (B,)", case=(images, wrong, None, std))
    refused(ArgumentError, "expected mean and std together", case=(floats, indices, std))
    refused(
        ArrayError, "of one dtype", case=(images, indices, column(backend, MEAN, 4, "float64"), std)
    )
    refused(
        ArrayError,
        "std must be floating point",
        case=(images, indices, None, column(backend, (1, 2, 3), 4, "int32")),
    )
    for values, ndim in ((STD[:2], 4), (STD[:1], 4), (STD, 3), (STD, 5)):
        wrong = column(backend, values, ndim, "float32")
        refused(
            ShapeError,
            "std must have one value per channel, shape (3, 1, 1)",
            case=(images, None, None, wrong),
        )
        refused(ShapeError, "mean must have", case=(images, None, wrong, std))
    refused(
        ShapeError,
        "expected images (N, C, *S), got 5",
        case=(backend.array(pixels(5)), None, None, std),
    )
    refuses(ArrayError, "expected an array", "list", call=lambda: take_batch([[1.0]]))  # type: ignore[arg-type]


def test_mixed_libraries_are_refused(backend: Here):
    pytest.importorskip("array_api_strict")
    stranger = resolve("array_api_strict" if backend.backend.name == "numpy" else "numpy")
    images, indices = backend.array(pixels(5, 3, 2, 2)), backend.array(np.arange(3))
    std = column(backend, STD, 4, "float32")
    for case in (
        (images, stranger.asarray(np.arange(3)), None, std),
        (images, indices, None, stranger.asarray(np.ones((3, 1, 1)), "float32")),
        (images, indices, stranger.asarray(np.ones((3, 1, 1)), "float32"), std),
    ):
        refuses(
            ArrayError,
            "take_batch: ",
            "one library",
            stranger.name,
            call=lambda case=case: take_batch(*case),
        )
