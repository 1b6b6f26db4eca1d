"""How products are cut for a GPU: every number is covered once, splits are whole, and a large GPU has enough to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portacnn.backends.cupy.plan import (
    DEEP,
    FEW_ROWS,
    LARGE,
    PROCESSORS,
    SMALL,
    SOME_ROWS,
    SPLIT_TILES,
    THREADS,
    WIDE,
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
def test_no_large_tile_leaves_most_processors_idle(m, n, times, itemsize):
    tile = wide_tile(m, n, times, itemsize)
    assert tile in WIDE_TILES
    assert tile.tm * tile.tn * itemsize <= 256
    assert tile.blocks(m, n) * times >= min(PROCESSORS // 3, SMALL.blocks(m, n) * times)


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (16, 28 * 28 * 100, FEW_ROWS),
        (30, 24 * 24 * 100, SOME_ROWS),
        (64, 32 * 32 * 512, WIDE),
        (256, 8 * 8 * 64, WIDE),  # half as many large ones as there are processors
        (512, 100_000, LARGE),
        (10, 100, SMALL),
    ],
)
def test_tiles_fit_their_products(m, n, tile):
    assert wide_tile(m, n, 1, 4) == tile


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
