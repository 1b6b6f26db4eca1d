"""The CUDA kernels of ReLU, sums and batches, run on the host, against NumPy."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import elementwise as cupy_elementwise
from support.cuda_rig import Rig, needs_compiler, orders, rigged
from support.drawing import arguments_of

pytestmark = needs_compiler

dtypes = st.sampled_from(["float32", "float64"])
shapes = arguments_of("relu", "small").map(lambda arguments: arguments["x"].shape)
ways = st.sampled_from(["first", "last", "apart"])


def laid(rig: Rig, host: np.ndarray, dtype: str, way: str) -> np.ndarray:
    if way == "apart" and host.ndim:
        return rig.array(np.repeat(host, 2, axis=0), dtype)[::2]
    return rig.array(
        host, dtype, (*range(1, host.ndim), 0) if way == "last" and host.ndim else None
    )


@settings(max_examples=30)
@given(shapes, dtypes, orders, ways, ways, st.integers(0, 99))
def test_relu(shape: tuple, dtype: str, order: str, x_lies: str, dy_lies: str, seed: int):
    draw = np.random.default_rng(seed)
    host = draw.choice([-1.5, -0.0, 0.0, 2.5, np.nan, np.inf, -np.inf], shape)
    with rigged(order, seed) as rig:
        x, dy = laid(rig, host, dtype, x_lies), laid(rig, draw.normal(size=shape), dtype, dy_lies)
        y, saved = cupy_elementwise.relu(x)
        np.testing.assert_array_equal(y, np.where(np.isnan(host) | (host > 0), host, 0))
        dx = cupy_elementwise.relu_backward(dy, saved)
        np.testing.assert_array_equal(dx, np.where(host <= 0, 0, dy))
        assert y.dtype == dx.dtype == dtype
        assert [name for name, *_ in rig.launches] == ["relu", "relu_backward"]
        assert cupy_elementwise.relu(x, keep=False)[1] is None


@settings(max_examples=30)
@given(shapes, st.lists(ways, min_size=2, max_size=9), dtypes, orders, st.integers(0, 99))
def test_sums(shape: tuple, lie: list, dtype: str, order: str, seed: int):
    draw = np.random.default_rng(seed)
    with rigged(order, seed) as rig:
        parts = [laid(rig, draw.normal(size=shape), dtype, way) for way in lie]
        wanted = parts[0]
        for part in parts[1:]:
            wanted = wanted + part  # from left to right: the same bits
        got = cupy_elementwise.add(parts)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, wanted)
        assert len(rig.launches) == -(-(len(parts) - 1) // 3)
        y, saved = cupy_elementwise.add_relu(parts)
        np.testing.assert_array_equal(y, np.maximum(wanted, 0))
        dy = laid(rig, draw.normal(size=shape), dtype, lie[-1])
        np.testing.assert_array_equal(
            cupy_elementwise.relu_backward(dy, saved), np.where(wanted <= 0, 0, dy)
        )
        assert cupy_elementwise.add_relu(parts, keep=False)[1] is None


@settings(max_examples=40)
@given(
    arguments_of("take_batch", "small").filter(lambda given: given["images"].ndim > 2),
    dtypes,
    st.sampled_from(["int64", "int32", "uint8"]),
    orders,
    st.integers(0, 99),
)
def test_take_batch(arguments: dict, dtype: str, counted: str, order: str, seed: int):
    draw, (n, c, *size) = np.random.default_rng(seed), arguments["images"].shape
    batch = None if arguments["indices"] is None else len(arguments["indices"])
    kind = "floats" if arguments.get("std") is None else "bytes"
    kind += " less a mean" if arguments.get("mean") is not None else ""
    if kind == "floats" and batch is None:
        batch = 5
    with rigged(order, seed) as rig:
        host = draw.integers(0, 256, (n, c, *size))
        images = rig.array(host, dtype if kind == "floats" else "uint8")
        chosen = np.arange(n) if batch is None else draw.integers(0, n, batch)
        indices = None if batch is None else rig.array(chosen, counted)
        along = (c, *[1] * len(size))
        std = None if kind == "floats" else rig.array(draw.uniform(1, 99, along), dtype)
        mean = (
            rig.array(draw.uniform(0, 255, along), dtype) if kind == "bytes less a mean" else None
        )
        y = cupy_elementwise.take_batch(images, indices, mean, std)
        wanted = host[chosen].astype(dtype)
        if mean is not None:
            wanted = wanted - mean
        if std is not None:
            wanted = wanted / std
        assert wanted.dtype == y.dtype == dtype
        np.testing.assert_array_equal(y, wanted)  # bit for bit
        assert y.transpose(*range(1, y.ndim), 0).flags.c_contiguous
        assert [name for name, *_ in rig.launches] == ["take_batch"]


def test_an_image_that_is_not_in_the_set_is_nan():
    with rigged() as rig:
        images, std = (
            rig.array(np.ones((3, 1, 2, 2)), "uint8"),
            rig.array(np.full((1, 1, 1), 255.0), "float32"),
        )
        y = cupy_elementwise.take_batch(
            images, rig.array(np.array([2, 3, -1, 0]), "int64"), None, std
        )
        np.testing.assert_array_equal(np.isnan(y[:, 0, 0, 0]), [False, True, True, False])
        np.testing.assert_array_equal(y[0], np.full((1, 2, 2), np.float32(1) / np.float32(255)))


def test_long_arrays_take_no_more_blocks_than_run_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("portacnn.backends.cupy.memory.FULL", 3)
    host = np.random.default_rng(0).normal(size=(50, 73))
    with rigged("shuffled") as rig:
        x = rig.array(host, "float64")
        np.testing.assert_array_equal(cupy_elementwise.relu(x)[0], np.maximum(host, 0))
        np.testing.assert_array_equal(cupy_elementwise.add([x, x, x]), host + host + host)
        assert [grid for _, grid, _ in rig.launches] == [(3,), (3,)]


def test_what_is_declined():
    with rigged() as rig:
        half, empty, one = (
            rig.array(np.ones(n), t) for n, t in ((3, "float16"), (0, "float32"), (3, "float32"))
        )
        for x in (half, empty):
            assert cupy_elementwise.relu(x) is NotImplemented
            assert cupy_elementwise.add([x, x]) is NotImplemented
            assert cupy_elementwise.add_relu([x, x]) is NotImplemented
        assert cupy_elementwise.add([one]) is NotImplemented
        images, std = rig.array(np.ones((3, 2, 4)), "uint8"), rig.array(np.ones((2, 1)), "float32")
        nothing = rig.array(np.ones(0), "int64")
        calls: list[Any] = [
            (images, nothing, None, std),
            (images[:, :, ::2], None, None, std),
            (one[None], None, None, None),
        ]
        for call in calls:
            assert cupy_elementwise.take_batch(*call) is NotImplemented
