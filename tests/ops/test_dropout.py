"""Dropout: masks of the same bits everywhere, whatever the strides and the cut of the batch; random
as far as tests can tell."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ArgumentError, ArrayError, ShapeError
from portacnn.layers import (
    Conv2d,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    Flatten,
    Linear,
    Sequential,
    at_step,
)
from portacnn.ops.masks import kept, sample_words
from portacnn.runtime import resolve
from portacnn.seeds import words
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    refuses_integers_and_lists,
    untouched,
    with_each_kernel,
)
from support.matrix import Here

CHANNELS = {1: "dropout1d", 2: "dropout2d", 3: "dropout3d"}


def triple32(x: int) -> int:
    """As its author prints it, on Python ints of 32 bits."""
    x ^= x >> 17
    x = x * 0xED5AD4BB % 2**32
    x ^= x >> 11
    x = x * 0xAC4C1B51 % 2**32
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    return x ^ (x >> 14)


def mask(
    count: int, length: int, p: float, seed: int, path: str, step: int = 0, first: int = 0
) -> np.ndarray:
    """The definition, one number at a time."""
    kept_ = np.zeros((count, length), dtype=bool)
    for n in range(count):
        one, other = words(seed, "dropout", path)
        position = first + n
        for part in (step % 2**32, step // 2**32, position % 2**32, position // 2**32):
            one, other = triple32(one ^ part), triple32(other ^ part)
        for i in range(length):
            x = i ^ one
            x ^= x >> 17
            x = (x * 0xED5AD4BB % 2**32) ^ other
            x ^= x >> 11
            x = x * 0xAC4C1B51 % 2**32
            x ^= x >> 15
            x = x * 0x31848BAB % 2**32
            kept_[n, i] = x ^ (x >> 14) >= p * 2**32
    return kept_


def ones(here: Here, *shape: int) -> Any:
    return here.array(np.ones(shape), "float32")


# --- the bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "first"),
    [
        (0, 0),
        (1, 0),
        (0, 7),
        (12345, 678),
        (2**32 - 1, 2**31),
        (2**40 + 3, 2**33 + 5),
        (2**63 - 1, 0),
    ],
)
@with_each_kernel
def test_bits_are_as_defined(backend: Here, step: int, first: int):
    y, _ = ops.dropout(ones(backend, 3, 2, 3, 2), 0.3, seed=5, path="drop1", step=step, first=first)
    expected = mask(3, 12, 0.3, 5, "drop1", step, first).reshape(3, 2, 3, 2)
    agree(backend, y, expected / 0.7, y)
    y, _ = ops.dropout2d(
        ones(backend, 3, 5, 2, 3), 0.4, seed=5, path="drop1", step=step, first=first
    )
    expected = mask(3, 5, 0.4, 5, "drop1", step, first)[:, :, None, None] * np.ones((2, 3))
    agree(backend, y, expected / 0.6, y)


@with_each_kernel
def test_bits_never_change(backend: Here):
    """A saved run goes on with the masks it had. This is the hash of the first release, from the
    definition above."""
    y, _ = ops.dropout(ones(backend, 2, 16), 0.5, seed=0, path="drop", step=3)
    bits = ["".join("1" if v else "0" for v in row) for row in backend.host(y)]
    assert bits == FIRST_RELEASE


FIRST_RELEASE = ["1111111011000101", "0101110001001001"]


def test_a_numpy_kernel_gives_the_bits_of_the_portable_op():
    like = np.ones(1)
    rng = np.random.default_rng(0)
    for count, length in ((1, 1), (3, 70_000), (40_000, 3), (100, 700), (0, 5), (5, 0)):
        one, other = (rng.integers(0, 2**32, count) for _ in range(2))
        for threshold in (0, 1, 2**31, 2**32 - 1, 2**32):
            expected = kept.forward(like, length, one, other, threshold)
            assert np.array_equal(kept(like, length, one, other, threshold), expected)
            assert expected.shape == (count, length)


@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    p=st.floats(0, 1),
    seed=st.integers(0, 2**70),
    step=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**40),
)
@with_each_kernel
def test_all_backends_agree(backend: Here, shape: list, p: float, seed: int, step: int, first: int):
    options = {"seed": seed, "path": "a.b", "step": step, "first": first}
    ours, _ = ops.dropout(ones(backend, *shape), p, **options)
    with ops.use_kernels("reference"):
        numpys, _ = ops.dropout(np.ones(shape, dtype="float32"), p, **options)
    assert backend.host(ours).tobytes() == np.ascontiguousarray(numpys).tobytes()


@pytest.mark.parametrize("kind", ["int32", "int64"])
@with_each_kernel
def test_step_and_first_may_be_arrays_on_the_device(backend: Here, kind: str):
    x = ones(backend, 4, 6)
    expected, _ = ops.dropout(x, seed=1, step=70_000, first=9)
    step, first = (backend.array(np.asarray(v, dtype=kind)) for v in (70_000, 9))
    y, cache = ops.dropout(x, seed=1, step=step, first=first)
    agree(backend, y, backend.host(expected), x)
    agree(backend, ops.dropout_backward(x, cache), backend.host(expected), x)
    y, _ = ops.dropout(x, seed=1, step=step, first=9)
    agree(backend, y, backend.host(expected), x)


@pytest.mark.parametrize("layout", LAYOUTS)
@with_each_kernel
def test_strides_do_not_matter(backend: Here, layout: str):
    host, up = normal(3, 4, 2, 5), normal(3, 4, 2, 5, seed=1)
    for dtype in DTYPES:
        x, dy = laid_out(backend, host, dtype, layout), laid_out(backend, up, dtype, layout)
        with untouched(backend, x, dy):
            y, cache = ops.dropout(x, 0.25, seed=3, path="x")
            dx = ops.dropout_backward(dy, cache)
        stays = mask(3, 40, 0.25, 3, "x").reshape(host.shape)
        agree(backend, y, host * stays / 0.75, x)
        agree(backend, dx, up * stays / 0.75, x)


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 5), (2, 4, 6)])
@with_each_kernel
def test_the_cut_of_a_batch_does_not_matter(backend: Here, cuts: tuple):
    x = ones(backend, 8, 3, 2)
    for name in ("dropout", "dropout1d"):
        op = getattr(ops, name)
        whole, _ = op(x, seed=2, step=4)
        bounds = [0, *cuts, 8]
        parts = [op(x[a:b, ...], seed=2, step=4, first=a)[0] for a, b in pairwise(bounds)]
        agree(backend, backend.xp.concat(parts, axis=0), backend.host(whole), x)


# --- rates, gradients, refusals -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dropout", "dropout2d"])
@with_each_kernel
def test_nothing_and_everything(backend: Here, name: str):
    host = normal(3, 4, 2, 2)
    x, op, back = backend.array(host), getattr(ops, name), getattr(ops, name + "_backward")
    for options, factor in (
        ({"p": 0.0}, 1.0),
        ({"p": 1.0}, 0.0),
        ({"p": 0.7, "training": False}, 1.0),
    ):
        y, cache = op(x, **options, seed=0)
        agree(backend, y, factor * host, x)
        agree(backend, back(x, cache), factor * host, x)
        assert op(x, **options, seed=0, keep=False)[1] is None


@pytest.mark.parametrize("axes", [1, 2, 3])
@with_each_kernel
def test_channels_fall_together(backend: Here, axes: int):
    host = 1 + normal(5, 6, *(2, 3, 2)[:axes]) ** 2
    x = backend.array(host)
    y, cache = getattr(ops, CHANNELS[axes])(x, 0.5, seed=1)
    stays = mask(5, 6, 0.5, 1, "").reshape(5, 6, *[1] * axes)
    assert 0 < stays.sum() < stays.size
    agree(backend, y, host * stays * 2, x)
    agree(backend, getattr(ops, CHANNELS[axes] + "_backward")(x, cache), host * stays * 2, x)


def test_gradients_agree_with_numerical_gradients(backend: Here):
    host = normal(2, 3, 2)
    dy = backend.array(normal(2, 3, 2, seed=1))
    for op, back in ((ops.dropout, ops.dropout_backward), (ops.dropout1d, ops.dropout1d_backward)):
        _, cache = op(backend.array(host), 0.4, seed=8)
        gradient_agrees(
            backend,
            back(dy, cache),
            lambda x, op=op: backend.xp.sum(op(x, 0.4, seed=8, keep=False)[0] * dy),
            host,
        )


def test_wrong_arguments_are_refused(backend: Here):
    x = ones(backend, 2, 3)
    for p in (-0.1, 1.1, float("nan"), "half", True):
        refuses(
            ArgumentError,
            "dropout: ",
            "p must",
            repr(p),
            call=lambda p=p: ops.dropout(x, p, seed=0),
        )
    for name in ("step", "first"):
        for value in (-1, 1.5, 2**63, True):
            refuses(
                ArgumentError,
                name,
                repr(value),
                call=lambda n=name, v=value: ops.dropout(x, seed=0, **{n: v}),
            )
        for value in (backend.array(np.ones(1, dtype="int64")), backend.array(np.asarray(1.0))):
            refuses(
                ArgumentError,
                name,
                "0-dimensional",
                call=lambda n=name, v=value: ops.dropout(x, seed=0, **{n: v}),
            )
        stranger = resolve(
            "array_api_strict:device2" if backend.backend.name != "array_api_strict" else "numpy"
        )
        value = stranger.asarray(np.asarray(1))
        refuses(
            ArrayError,
            name,
            stranger.name,
            call=lambda n=name, v=value: ops.dropout(x, seed=0, **{n: v}),
        )
    for axes, name in CHANNELS.items():
        refuses(
            ShapeError,
            f"{name}: ",
            "(N, C",
            call=lambda n=name, a=axes: getattr(ops, n)(ones(backend, *[2] * (a + 1)), seed=0),
        )
    refuses_integers_and_lists(
        backend, "dropout: ", lambda x: ops.dropout(x, seed=0), np.ones((2, 2))
    )


# --- chance ---------------------------------------------------------------------------------------


def kept_bits(n: int, length: int, p: float = 0.5, **options: Any) -> np.ndarray:
    y, _ = ops.dropout(
        np.ones((n, length), dtype="float32"), p, **{"seed": 0, **options}, keep=False
    )
    return y > 0


def z_of(mean: float, p: float, count: int) -> float:
    """How many standard deviations a share is from p."""
    return abs(mean - p) / math.sqrt(p * (1 - p) / count)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_that_stays(p: float):
    bits = kept_bits(256, 4096, p)
    assert z_of(bits.mean(), 1 - p, bits.size) < 4
    for axis in (0, 1):
        counts = bits.sum(axis=axis)
        count = bits.shape[axis]
        chi2 = ((counts - count * (1 - p)) ** 2 / (count * p * (1 - p))).sum()
        assert abs(chi2 - counts.size) < 5 * math.sqrt(2 * counts.size)


def test_neighbours_have_nothing_to_do_with_each_other():
    """Along a sample, between samples, steps, seeds and paths: agreement by chance, at every
    distance tried."""
    bits = kept_bits(256, 4096)
    for distance in (1, 2, 3, 7, 8, 16, 28, 64, 784, 1024):
        assert (
            z_of((bits[:, distance:] == bits[:, :-distance]).mean(), 0.5, bits[:, distance:].size)
            < 4.5
        )
        if distance < 256:
            assert (
                z_of((bits[distance:] == bits[:-distance]).mean(), 0.5, bits[distance:].size) < 4.5
            )
    for other in (
        {"step": 1},
        {"step": 2**32},
        {"seed": 1},
        {"path": "a"},
        {"first": 2**32},
        {"step": 1, "first": 1},
    ):
        assert z_of((bits == kept_bits(256, 4096, **other)).mean(), 0.5, bits.size) < 4.5


def test_bytes_are_spread_evenly():
    """Chi-square over 256 patterns of eight neighbours, along samples and across them."""
    bits = kept_bits(512, 4096)
    for table in (bits, bits.T):
        counts = np.bincount(np.packbits(table, axis=None), minlength=256)
        expected = bits.size / 8 / 256
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


def test_no_two_samples_are_alike():
    bits = kept_bits(4096, 128)
    assert len(np.unique(np.packbits(bits, axis=1), axis=0)) == 4096
    agreement = (2.0 * bits[:512] - 1) @ (2.0 * bits[:512] - 1).T / 128
    assert np.abs(agreement - np.eye(512)).max() < 0.6


def test_words_differ_for_each_sample_and_step():
    positions = np.arange(1000)
    seen = {
        pair
        for step in range(50)
        for pair in zip(*(w.tolist() for w in sample_words((1, 2), step, positions)), strict=True)
    }
    assert len(seen) == 50_000


# --- layers ---------------------------------------------------------------------------------------


def net(backend: Here, seed: int = 3) -> Sequential:
    layers = Sequential(
        conv=Conv2d(1, 4, 3),
        drop1=Dropout2d(0.3),
        flatten=Flatten(),
        drop2=Dropout(0.5),
        fc=Linear(None, 3),
    )
    return layers.build((1, 5, 5), device=backend.device, seed=seed)


def test_layers_draw_from_seed_path_and_step(backend: Here):
    layer = (
        Sequential(a=Dropout(0.5), b=Dropout(0.5))
        .build((40,), device=backend.device, seed=11)
        .children
    )
    x = ones(backend, 2, 40)
    for step in range(3):
        for name in "ab":
            y, cache = layer[name].forward(x, train=True)
            agree(backend, y, 2 * mask(2, 40, 0.5, 11, name, step), x)
            agree(backend, layer[name].backward(x, cache), 2 * mask(2, 40, 0.5, 11, name, step), x)


def test_at_step_reaches_every_layer(backend: Here):
    model, x = net(backend), backend.array(normal(6, 1, 5, 5), "float32")
    with at_step(7):
        whole = backend.host(model(x, train=True))
    for a, b in ((0, 2), (2, 6)):
        with at_step(7, first=a):
            part = backend.host(model(x[a:b, ...], train=True))
        np.testing.assert_allclose(part, whole[a:b], rtol=1e-5, atol=1e-5)
    step = backend.array(np.asarray(7))
    for _ in range(2):
        with at_step(step):
            np.testing.assert_allclose(
                backend.host(model(x, train=True)), whole, rtol=1e-5, atol=1e-5
            )
    assert model.children["drop1"].step == 0  # whoever says the step counts


def test_identity_out_of_training(backend: Here):
    x = backend.array(normal(2, 3, 4), "float32")
    for kind in (Dropout, Dropout1d):
        layer = kind(0.9).build((3, 4), device=backend.device, seed=0)
        agree(backend, layer(x), backend.host(x), x)
        y, cache = layer.forward(x)
        agree(backend, y, backend.host(x), x)
        agree(backend, layer.backward(x, cache), backend.host(x), x)
        assert layer.step == 0


def test_layers_check_their_numbers():
    for kind in (Dropout, Dropout1d, Dropout2d, Dropout3d):
        refuses(ArgumentError, kind.__name__, "p must", "-1", call=lambda k=kind: k(-1))
    for kind, shape in ((Dropout1d, (2,)), (Dropout2d, (2, 3)), (Dropout3d, (2, 3, 4))):
        refuses(ShapeError, kind.__name__, str(shape), call=lambda k=kind, s=shape: k().build(s))
