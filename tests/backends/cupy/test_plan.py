"""How products are cut for a GPU: every number is covered once, splits are whole, and a large GPU
has enough to do."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from portacnn.backends.cupy.memory import vector
from portacnn.backends.cupy.plan import (
    PROCESSORS,
    SPLIT_TILES,
    STEP,
    THREADS,
    TILES,
    VEC,
    WIDE_TILES,
    YIELDS,
    split_tile,
    wide_tile,
)

counts = st.integers(1, 5000)


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_a_tile_is_made_for_its_kernel(tile):
    assert tile.rows * tile.columns * tile.slices == THREADS * tile.tm * tile.tn
    assert THREADS % (tile.tx * tile.slices) == 0
    assert tile in {*WIDE_TILES, *SPLIT_TILES}
    for itemsize in (4, 8):
        if tile.tm * tile.tn * itemsize > 256:
            continue
        buffers = 2 * tile.deep(itemsize) * (tile.rows + tile.columns + 8) * itemsize
        sums = (tile.slices > 1) * tile.slices * tile.rows * tile.columns * itemsize
        assert max(buffers, sums) <= 48 * 1024
        # a load is of one step of depth, and a thread has the four taps of a window
        if tile in WIDE_TILES:
            assert STEP[itemsize] % (THREADS * VEC[itemsize] // tile.columns) == 0
            assert tile.tn % 4 == 0


def test_yields_are_relative_to_the_best_tile():
    assert set(YIELDS) == {"forward", "input", "weight"}
    for kernel, yields in YIELDS.items():
        assert max(yields.values()) == 1, kernel
        assert all(0 < share <= 1 and name in TILES for name, share in yields.items())
        assert {TILES[name] for name in yields} == set(
            SPLIT_TILES if kernel == "weight" else WIDE_TILES
        )


@given(counts, counts, counts, st.integers(1, 8))
def test_splits_cover_the_depth(m, n, depth, times):
    tile, splits, each = split_tile(m, n, depth, times)
    assert each % max(VEC.values()) == 0
    assert (splits - 1) * each < depth <= splits * each
    assert splits == 1 or each >= 64
    assert splits == 1 or tile.blocks(m, n) * times < PROCESSORS


@given(
    counts,
    st.integers(1, 10**7),
    st.integers(1, 64),
    st.sampled_from([4, 8]),
    st.sampled_from(["forward", "input"]),
)
def test_no_large_tile_leaves_most_processors_idle(m, n, times, itemsize, kernel):
    tile = wide_tile(m, n, times, itemsize, kernel)
    assert tile in WIDE_TILES
    assert tile.tm * tile.tn * itemsize <= 256
    assert tile.blocks(m, n) * times >= min(PROCESSORS // 4, TILES["SMALL"].blocks(m, n) * times)


@pytest.mark.parametrize(
    ("m", "n", "tile"),
    [
        (16, 28 * 28 * 100, "FEW"),
        (30, 24 * 24 * 512, "SOME"),
        (64, 32 * 32 * 512, "WIDE"),
        (256, 8 * 8 * 64, "WIDE"),  # half as many large ones as there are processors
        (512, 100_000, "LARGE"),
        (10, 100, "SMALL"),
    ],
)
def test_tiles_fit_their_products(m, n, tile):
    assert wide_tile(m, n, 1, 4) == TILES[tile]


@pytest.mark.parametrize(
    ("m", "n", "depth", "tile"),
    [
        (16, 144, 32 * 32 * 128, "NARROW"),  # ResNet20's weights, from its first stage to its last
        (32, 289, 16 * 16 * 128, "SMALL"),
        (32, 288, 16 * 16 * 128, "TINY"),
        (64, 576, 8 * 8 * 128, "SQUARE"),
        (30, 26, 24 * 24 * 100, "TINY"),
    ],
)
def test_tiles_fit_the_weights_of_layers(m, n, depth, tile):
    assert split_tile(m, n, depth, 1).tile == TILES[tile]


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


@pytest.mark.parametrize(
    ("n", "addresses", "count"),
    [(8, (0, 256), 4), (8, (0, 8), 1), (8, (4, 0), 1), (6, (0, 0), 1), (8, (0, None), 4)],
)
def test_16_bytes_are_read_at_once_only_where_every_array_allows_it(n, addresses, count):
    arrays = [
        None if at is None else SimpleNamespace(itemsize=4, data=SimpleNamespace(ptr=at))
        for at in addresses
    ]
    assert vector(n, *arrays) == count
