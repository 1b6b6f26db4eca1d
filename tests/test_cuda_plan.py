"""How products are cut for a GPU: every number is covered once, splits are whole, and a large GPU has enough to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portacnn.backends.cupy_plan import (
    DEEP,
    ENOUGH,
    LARGE,
    PROCESSORS,
    SMALL,
    SPLIT_TILES,
    THREADS,
    WIDE_TILES,
    split_tile,
    wide_tile,
)

counts = st.integers(1, 5000)


@pytest.mark.parametrize("tile", {*WIDE_TILES, *SPLIT_TILES})
def test_a_tile_is_made_for_its_kernel(tile):
    assert tile.rows * tile.columns == THREADS * tile.tm * tile.tn
    assert THREADS % tile.tx == 0
    assert THREADS % tile.columns == 0 or tile in SPLIT_TILES  # a thread reads one column
    assert DEEP % max(THREADS // tile.columns, 1) == 0 or tile in SPLIT_TILES
    assert tile.tn % 4 == 0 or tile not in WIDE_TILES  # four taps of a window
    for itemsize in (4, 8):
        room = 2 * DEEP * (tile.rows + tile.columns + 8) * itemsize
        assert room <= 48 * 1024
    if tile in SPLIT_TILES:  # a thread of 32 above each other reads whole rows
        assert tile.rows % (THREADS // DEEP) == 0
        assert tile.columns % (THREADS // DEEP) == 0


@given(counts, counts, counts, st.integers(1, 8))
def test_splits_cover_the_depth(m, n, depth, times):
    tile, splits, each = split_tile(m, n, depth, times)
    assert each % DEEP == 0
    assert (splits - 1) * each < depth <= splits * each
    assert splits == 1 or each >= 64
    assert splits == 1 or tile.blocks(m, n) * times < PROCESSORS


@given(counts, st.integers(1, 10**7), st.integers(1, 64), st.sampled_from([4, 8]))
def test_a_smaller_tile_only_where_the_larger_leaves_processors_idle(m, n, times, itemsize):
    tile = wide_tile(m, n, times, itemsize)
    assert tile in WIDE_TILES
    assert tile.tm * tile.tn * itemsize <= 256
    assert tile == SMALL or tile.blocks(m, n) * times >= ENOUGH
    assert tile.rows <= max(2 * m, 32)


@pytest.mark.parametrize(
    ("what", "m", "n", "depth"),
    [
        ("SimpleConvNet's weight", 30, 26, 24 * 24 * 100),
        ("its first affine map", 100, 100, 4320),
        ("that map's weight", 100, 4321, 100),
        ("that map's input", 4320, 100, 100),
        ("a ResNet's weight", 64, 577, 8 * 8 * 512),
    ],
)
def test_a_large_gpu_is_busy(what, m, n, depth):
    tile, splits, _ = split_tile(m, n, depth, 1)
    assert tile.blocks(m, n) * splits >= 100, what


def test_large_products_take_large_tiles():
    assert wide_tile(512, 100_000, 1, 4) == LARGE
    assert wide_tile(512, 100_000, 1, 8) != LARGE
