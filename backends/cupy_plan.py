"""How matrix products are cut for a GPU: which tile a block takes, and in how many splits the depth goes. Plain numbers only.

Notation: a product has M rows, N columns and depth K. A GPU is full when each of its multiprocessors has a block or two.
"""

from typing import NamedTuple

THREADS = 256
DEEP = 8  # BK of cuda/tile.cuh
PROCESSORS = 132  # of an H100; others are near enough for choosing
ENOUGH = 2 * PROCESSORS  # blocks: with fewer the next smaller tile is worth more than its better ratio of work to reads
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


# Rows by columns of a block. Four columns a thread, or eight: with pooling they are the taps of one window, or of two.
FEW_ROWS = Tile(4, 4, 64)  # 16 x 256
SOME_ROWS = Tile(4, 4, 32)  # 32 x 128
SMALL = Tile(2, 4, 16)  # 32 x 64
SQUARE = Tile(4, 4, 16)  # 64 x 64
WIDE = Tile(4, 8, 16)  # 64 x 128
LARGE = Tile(8, 8, 16)  # 128 x 128
TINY = Tile(2, 2, 16)  # 32 x 32: for products with a split depth

WIDE_TILES = (FEW_ROWS, SOME_ROWS, SMALL, SQUARE, WIDE, LARGE)
SPLIT_TILES = (TINY, SQUARE)


def wide_tile(m: int, n: int, times: int, itemsize: int) -> Tile:
    """For a product with few rows and many columns, ``times`` over: as a convolution's is.

    No tile has twice the rows there are; of the others it is the largest of which there are enough, else the smallest. Of doubles a
    thread's registers hold half as many.
    """
    if m <= 16:
        return FEW_ROWS if FEW_ROWS.blocks(m, n) * times >= ENOUGH else SMALL
    if m <= 32:
        return SOME_ROWS if SOME_ROWS.blocks(m, n) * times >= ENOUGH else SMALL
    candidates = (LARGE, WIDE, SQUARE) if m > 64 else (WIDE, SQUARE)
    for tile in candidates:
        if tile.tm * tile.tn * itemsize <= 256 and tile.blocks(m, n) * times >= ENOUGH:
            return tile
    return SMALL


class Split(NamedTuple):
    tile: Tile
    splits: int
    each: int  # depth of a split: a multiple of DEEP

    @property
    def splits_needed(self) -> bool:
        return self.splits > 1


def split_tile(m: int, n: int, depth: int, times: int) -> Split:
    """For a product with few numbers and much depth, ``times`` over: as a weight's gradient is.

    The depth is split until there are enough blocks, but no split has less than ``_LEAST_DEPTH``.
    """
    tile = (
        TINY if min(m, n) <= 32 or (SQUARE.blocks(m, n) * times < PROCESSORS and depth < 2 * _LEAST_DEPTH) else SQUARE
    )
    blocks = tile.blocks(m, n) * times
    splits = 1
    if blocks < PROCESSORS:
        splits = max(1, min(-(-ENOUGH // blocks), depth // _LEAST_DEPTH, MOST_SPLITS))
    each = -(-depth // splits)
    each = -(-each // DEEP) * DEEP
    return Split(tile, -(-depth // each), each)
