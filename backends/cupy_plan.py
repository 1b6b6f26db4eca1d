"""How matrix products are cut for a GPU: which tile a block takes, and in how many splits the depth goes. Plain numbers only.

Notation: a product has M rows, N columns and depth K. A GPU is full when each of its multiprocessors has a block or two.
"""

from typing import NamedTuple

THREADS = 256
DEEP = 8  # BK of cuda/tile.cuh
PROCESSORS = 132  # of an H100; others are near enough for choosing
ENOUGH = 2 * PROCESSORS  # blocks, of a product whose depth is split
_LEAST_DEPTH = 64  # of a split: below, writing and adding up the partial sums costs more than it brings
MOST_SPLITS = 512


class Tile(NamedTuple):
    """A thread's share, TM by TN numbers, and how many of a block's 256 threads stand side by side."""

    tm: int
    tn: int
    tx: int

    @property
    def rows(self) -> int:
        return THREADS // self.tx * self.tm

    @property
    def columns(self) -> int:
        return self.tx * self.tn

    @property
    def defines(self) -> dict[str, str | int]:
        return {"TM": self.tm, "TN": self.tn, "TX": self.tx}

    def blocks(self, m: int, n: int) -> int:
        """How many of them cover M by N."""
        return -(-m // self.rows) * -(-n // self.columns)


# Rows by columns of a block. With pooling a thread's four columns are the taps of one window. Where a warp's 32 threads stand side
# by side, they read the same rows from shared memory, so a high tile is as good as a square one.
FEW_ROWS = Tile(4, 4, 64)  # 16 x 256
SOME_ROWS = Tile(4, 4, 32)  # 32 x 128
SMALL = Tile(2, 4, 16)  # 32 x 64
SQUARE = Tile(4, 4, 16)  # 64 x 64
WIDE = Tile(8, 4, 32)  # 64 x 128
LARGE = Tile(16, 4, 32)  # 128 x 128
# For products with a split depth:
TINY = Tile(4, 1, 32)  # 32 x 32
EVEN = Tile(8, 2, 32)  # 64 x 64

WIDE_TILES = (FEW_ROWS, SOME_ROWS, SMALL, SQUARE, WIDE, LARGE)
SPLIT_TILES = (TINY, EVEN)


TILES = {
    **{"FEW": FEW_ROWS, "SOME": SOME_ROWS, "SMALL": SMALL, "SQUARE": SQUARE, "WIDE": WIDE, "LARGE": LARGE},
    **{"TINY": TINY, "EVEN": EVEN},
}

YIELDS: dict[str, dict[str, float]] = {
    "forward": {"FEW": 0.65, "SOME": 0.7, "SMALL": 0.4, "SQUARE": 0.65, "WIDE": 0.85, "LARGE": 1.0},
    "input": {"FEW": 0.65, "SOME": 0.7, "SMALL": 0.4, "SQUARE": 0.65, "WIDE": 0.85, "LARGE": 1.0},
    "weight": {"TINY": 0.4, "EVEN": 1.0},
}
"""What share of a multiprocessor's arithmetic a tile can use, relative to the best one, by its ratio of products to reads from
shared memory. Estimated, not measured: no GPU was at hand."""


def wide_tile(m: int, n: int, times: int, itemsize: int, kernel: str = "forward") -> Tile:
    """For a product with few rows and many columns, ``times`` over: as a convolution's is.

    The one with which the busiest multiprocessor is done first. Of doubles a thread's registers hold half as many.

    Args:
        kernel: "forward" or "input", a key of ``YIELDS``.
    """

    def cost(name: str) -> float:
        tile = TILES[name]
        return -(-tile.blocks(m, n) * times // PROCESSORS) * tile.rows * tile.columns / YIELDS[kernel][name]

    fitting = [name for name in YIELDS[kernel] if TILES[name].tm * TILES[name].tn * itemsize <= 256]
    return TILES[min(fitting, key=cost)]


class Split(NamedTuple):
    tile: Tile
    splits: int
    each: int  # depth of a split: a multiple of DEEP


def split_tile(m: int, n: int, depth: int, times: int) -> Split:
    """For a product with few numbers and much depth, ``times`` over: as a weight's gradient is.

    The depth is split until there are enough blocks, but no split has less than ``_LEAST_DEPTH``.
    """
    too_few = EVEN.blocks(m, n) * times < PROCESSORS and depth < 2 * _LEAST_DEPTH
    wanted = "TINY" if min(m, n) <= 32 or too_few else "EVEN"
    tile = TILES[wanted if wanted in YIELDS["weight"] else next(iter(YIELDS["weight"]))]
    blocks = tile.blocks(m, n) * times
    splits = 1
    if blocks < PROCESSORS:
        splits = max(1, min(-(-ENOUGH // blocks), depth // _LEAST_DEPTH, MOST_SPLITS))
    each = -(-depth // splits)
    each = -(-each // DEEP) * DEEP
    return Split(tile, -(-depth // each), each)
