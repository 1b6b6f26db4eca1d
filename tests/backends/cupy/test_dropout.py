"""The CUDA kernel of dropout, run on the host: bit for bit the portable masks, whose hash is
computed in int64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import dropout as cupy_dropout
from portacnn.ops.masks import drop
from portacnn.seeds import words
from support.cuda_rig import needs_compiler, orders, rigged
from support.drawing import arguments_of

pytestmark = needs_compiler

counters = st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**32, 2**40 + 7, 2**62]) | st.integers(
    0, 2**62
)


def triple32(x: int) -> int:
    """In Python's integers, from its author's page: no code is shared with either."""
    x ^= x >> 17
    x = x * 0xED5AD4BB % 2**32
    x ^= x >> 11
    x = x * 0xAC4C1B51 % 2**32
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    return x ^ (x >> 14)


def stays(index: int, key: tuple[int, int], step: int, place: int, p: float) -> bool:
    one, other = key
    for part in (step % 2**32, step // 2**32, place % 2**32, place // 2**32):
        one, other = triple32(one ^ part), triple32(other ^ part)
    x = index ^ one
    x = (x ^ (x >> 17)) * 0xED5AD4BB % 2**32 ^ other
    x = (x ^ (x >> 11)) * 0xAC4C1B51 % 2**32
    x = (x ^ (x >> 15)) * 0x31848BAB % 2**32
    return x ^ (x >> 14) >= round(p * 2**32)


@settings(max_examples=50)
@given(
    arguments_of("drop", "small"),
    st.tuples(counters, counters),
    st.tuples(*[st.booleans()] * 4),
    st.sampled_from(["float32", "float64"]),
    orders,
)
def test_the_portable_bits(arguments, counts, flags, dtype, order):
    (n, c, *size), key, p = arguments["x"].shape, arguments["key"], arguments["p"]
    channels = arguments["length"] == c
    step, first = counts
    on_device, narrow, x_last, dy_last = flags
    draw = np.random.default_rng(n).normal(size=(2, n, c, *size))
    length = c if channels and size else c * int(np.prod(size))
    last = (*range(1, draw.ndim - 1), 0)
    with rigged(order, n) as rig:
        x = rig.array(draw[0], dtype, last if x_last else None)
        dy = rig.array(draw[1], dtype, last if dy_last else None)
        places: list[Any] = [step, first]
        if on_device:
            if narrow:
                step, first = step % 2**31, first % 2**31
            places = [
                rig.array(np.array(count), "int32" if narrow else "int64")
                for count in (step, first)
            ]
        y, saved = cupy_dropout.drop(x, p, length, key, *places, keep=True)
        wanted, kept = drop.forward(x, p, length, key, step, first, keep=True)
        assert y.dtype == wanted.dtype
        np.testing.assert_array_equal(y, wanted)
        if on_device:
            for place in places:  # what the counters say later is nothing to the gradient
                place.flags.writeable = True
                place[...] = 77
        np.testing.assert_array_equal(
            cupy_dropout.drop_backward(dy, saved), drop.portable_backward(dy, kept)
        )
        assert [name for name, *_ in rig.launches] == ["drop", "drop"]
        if not on_device:
            again, nothing = cupy_dropout.drop(x, p, length, key, step, first, keep=False)
            assert nothing is None
            np.testing.assert_array_equal(again, y)


@pytest.mark.parametrize("channels", [False, True])
def test_the_hash(channels: bool):
    key, step, first, p = words(5, "dropout", "fc1"), 2**33 + 5, 2**32 - 1, 0.4
    with rigged("shuffled") as rig:
        x = rig.array(np.ones((3, 4, 5)), "float64")
        y, _ = cupy_dropout.drop(x, p, 4 if channels else 20, key, step, first, keep=False)
        for n, c, s in np.ndindex(3, 4, 5):
            wanted = stays(c if channels else c * 5 + s, key, step, first + n, p)
            assert (y[n, c, s] != 0) == wanted


def test_more_numbers_than_a_block_takes():
    with rigged("reverse") as rig:
        x = rig.array(np.ones((65, 300)), "float32", (1, 0))
        y, saved = cupy_dropout.drop(x, 0.5, 300, (1, 2), 3, 4, keep=True)
        assert rig.launches[0][1] == (3, 5)
        np.testing.assert_array_equal(y, drop.forward(x, 0.5, 300, (1, 2), 3, 4, keep=False)[0])
        np.testing.assert_array_equal(cupy_dropout.drop_backward(x, saved), y)
        assert 0.45 < (y == 0).mean() < 0.55


def test_what_is_declined():
    with rigged() as rig:
        for shape, dtype in (((2, 3), "float16"), ((0, 3), "float32")):
            assert (
                cupy_dropout.drop(rig.array(np.ones(shape), dtype), 0.5, 3, (1, 2), 0, 0, keep=True)
                is NotImplemented
            )
