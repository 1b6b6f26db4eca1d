"""im2col and col2im on CUDA, run on the host, against the definition written out cell by cell."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import columns as cupy_columns
from portacnn.ops.windows import Windows
from support.cuda_rig import needs_compiler, orders, rigged
from support.drawing import arguments_of

pytestmark = needs_compiler


def pairs(windows: Windows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Every (tap's number, *output), and the input that it reads there."""
    found = []
    for tap, k in enumerate(np.ndindex(windows.kernel)):
        for o in np.ndindex(windows.out):
            at = tuple(
                a * s + b * d - before
                for a, b, s, d, (before, _) in zip(
                    o, k, windows.stride, windows.dilation, windows.pads, strict=True
                )
            )
            if all(0 <= a < n for a, n in zip(at, windows.size, strict=True)):
                found.append(((tap, *o), at))
    return found


@settings(max_examples=30)
@given(arguments_of("gather", "small"), st.sampled_from(["float32", "float64"]), orders)
def test_there_and_back(arguments: dict, dtype: str, order: str):
    windows, (c, *_, n) = arguments["windows"], arguments["x"].shape
    draw = np.random.default_rng(n).standard_normal
    taps = int(np.prod(windows.kernel))
    with rigged(order) as rig:
        x = rig.array(draw((c, *windows.size, n)), dtype)
        columns = rig.array(draw((c, taps, *windows.out, n)), dtype)
        wanted, back = np.zeros(columns.shape, dtype), np.zeros(x.shape, dtype)
        for place, at in pairs(windows):
            wanted[:, *place] = x[:, *at]
            back[:, *at] += columns[:, *place]
        np.testing.assert_array_equal(cupy_columns.gather(x, windows), wanted)
        # tap by tap: to the bit
        np.testing.assert_array_equal(cupy_columns.scatter(columns, windows), back)


def test_more_channels_than_rows_of_blocks():
    windows = Windows.of((3,), 2)
    with rigged() as rig:
        x = rig.array(np.arange(70 * 3 * 2.0).reshape(70, 3, 2), "float32")
        columns = cupy_columns.gather(x, windows)
        np.testing.assert_array_equal(columns, np.stack([x[:, :2], x[:, 1:]], 1))
        wanted = columns[:, 0].sum(1) + columns[:, 1].sum(1)
        np.testing.assert_array_equal(cupy_columns.scatter(columns, windows).sum(1), wanted)
    assert all(grid[1] == 64 for _, grid, _ in rig.launches)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "int64"])
def test_other_dtypes_are_declined(dtype: str):
    with rigged() as rig:
        assert (
            cupy_columns.gather(rig.array(np.zeros((1, 3, 2)), dtype), Windows.of((3,), 2))
            is NotImplemented
        )
