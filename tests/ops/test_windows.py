"""What windows see of an input: cells of a last short window, and none at all."""

from itertools import product

import numpy as np
import pytest

from portacnn.errors import ArgumentError
from portacnn.ops import (
    avg_pool2d,
)
from portacnn.ops.windows import Windows
from support.checks import (
    with_each_kernel,
)
from support.matrix import Here


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [("float32", 2**24), ("float16", 2**11), ("bfloat16", 2**8), ("float64", 2**24)],
)
@with_each_kernel
def test_windows_are_counted_beyond_what_floats_count(backend: Here, dtype: str, exact: int):
    """Three windows of three cells: the first half beside the input, the last with one cell in it.
    Of ones the mean is 1."""
    if not hasattr(backend.xp, dtype) or (
        exact > 2**12 and backend.backend.name == "array_api_strict"
    ):
        return
    length = 2 * (exact + 1)
    one = backend.xp.ones(
        (1, 1, 1, 1), dtype=getattr(backend.xp, dtype), device=backend.backend.device
    )
    x = backend.xp.broadcast_to(one, (1, 1, 1, length))
    y, _ = avg_pool2d(
        x,
        (1, 3),
        stride=(1, exact + 1),
        padding=(0, 1),
        ceil_mode=True,
        count_include_pad=False,
        keep=False,
    )
    got = backend.host(backend.xp.astype(y, backend.xp.float64))
    np.testing.assert_allclose(got, np.ones((1, 1, 1, 3)), rtol=1e-6)


def test_windows_that_see_no_cell_by_looking():
    """``blind`` is worked out; here every cell of every window is looked at."""
    for size, kernel, stride, dilation, before, after in product(
        (1, 2, 4), (1, 2, 3), (1, 2, 3), (1, 2, 4), range(0, 9, 2), (0, 3, 6)
    ):
        if dilation * (kernel - 1) + 1 > size + before + after:
            continue
        windows = Windows.of((size,), kernel, stride, ((before, after),), dilation)
        seen = [
            any(0 <= o * stride + k * dilation - before < size for k in range(kernel))
            for o in range(*windows.out)
        ]
        assert windows.blind is not all(seen), (size, kernel, stride, dilation, before, after)


@pytest.mark.parametrize(
    ("size", "padding", "stride", "kernel"),
    [
        ((4, 4), 1 << 60, 1 << 61, 1),  # one output, of a huge padded input
        ((4, 4), 1 << 40, 1, 1),  # too many outputs
        ((1 << 25, 1 << 25), 0, 1 << 25, 1 << 25),  # too many inputs
    ],
)
def test_more_cells_than_any_memory_has_are_refused(size, padding, stride, kernel):
    """At once: nothing is allocated, and no loop runs over them."""
    with pytest.raises(ArgumentError, match="do not fit in memory"):
        Windows.of(size, kernel, stride, padding)
