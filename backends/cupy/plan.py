"""How matrix products are cut for a GPU: which tile a block takes, and in how many splits the depth
goes. Plain numbers only.

Notation: a product has M rows, N columns and depth K. A GPU is full when each of its
multiprocessors has a block or two.
"""

from typing import NamedTuple

THREADS = 256
STEP = {4: 16, 8: 8}  # of depth, by itemsize: STEP of cuda/tile.cuh
# numbers in 16 bytes, by itemsize: what a thread reads at once where they lie together
VEC = {4: 4, 8: 2}
PROCESSORS = 132  # of an H100; others are near enough for choosing
ENOUGH = 3 * PROCESSORS  # blocks, of a product whose depth is split: as many as run at once
# of a split: below, writing and adding up the partial sums costs more than it brings
_LEAST_DEPTH = 64
MOST_SPLITS = 512


class Tile(NamedTuple):
    """A thread's share, TM by TN numbers, how many threads stand side by side, and in how many
    slices a block's 256 are."""

    tm: int
    tn: int
    tx: int
    slices: int = 1

    @property
    def rows(self) -> int:
        return THREADS // self.slices // self.tx * self.tm

    @property
    def columns(self) -> int:
        return self.tx * self.tn

    def takes(self, itemsize: int) -> bool:
        """Whether a thread's registers hold its share."""
        return self.tm * self.tn * itemsize <= 256

    @property
    def area(self) -> int:
        return self.rows * self.columns

    @property
    def reads(self) -> float:
        """Numbers that a block reads for each product: of tiles that cost the same, the one that
        reads least is taken."""
        return (self.rows + self.columns) / self.area

    @property
    def defines(self) -> dict[str, str | int]:
        return {"TM": self.tm, "TN": self.tn, "TX": self.tx, "SLICES": self.slices}

    def blocks(self, m: int, n: int) -> int:
        """How many of them cover M by N."""
        return -(-m // self.rows) * -(-n // self.columns)

    def deep(self, itemsize: int) -> int:
        """Depth of what a block has in shared memory at a time: BK of cuda/tile.cuh, in float32 and
        float64 as they are."""
        return STEP[itemsize] * self.slices


# Rows by columns of a block.
TILES = {
    "FEW": Tile(4, 4, 64),  # 16 x 256
    "SOME": Tile(4, 4, 32),  # 32 x 128
    "SMALL": Tile(4, 4, 16, 2),  # 32 x 64
    "SQUARE": Tile(4, 4, 16),  # 64 x 64
    "WIDE": Tile(8, 4, 32),  # 64 x 128
    "LARGE": Tile(8, 8, 16),  # 128 x 128
    "TINY": Tile(4, 4, 8, 4),  # 32 x 32
    "NARROW": Tile(4, 4, 16, 4),  # 16 x 64
}
WIDE_TILES = tuple(TILES[name] for name in ("FEW", "SOME", "SMALL", "SQUARE", "WIDE", "LARGE"))
SPLIT_TILES = tuple(TILES[name] for name in ("TINY", "NARROW", "SMALL", "SQUARE"))

YIELDS: dict[str, dict[str, float]] = {
    "forward": {
        "LARGE": 1.0,
        "WIDE": 0.94,
        "SQUARE": 0.83,
        "SOME": 0.83,
        "FEW": 0.83,
        "SMALL": 0.73,
    },
    "input": {"LARGE": 1.0, "WIDE": 0.93, "SQUARE": 0.82, "SOME": 0.82, "FEW": 0.82, "SMALL": 0.69},
    "weight": {"SQUARE": 1.0, "SMALL": 0.93, "TINY": 0.93, "NARROW": 0.85},
}
"""What share of a multiprocessor's arithmetic a tile can use, relative to the best one: the share
of products among the instructions of its main loop (``scripts/gpu/sass.py --yields``). Estimated,
not measured: no GPU was available."""


def wide_tile(m: int, n: int, times: int, itemsize: int, kernel: str = "forward") -> Tile:
    """For a product with few rows and many columns, ``times`` over: as a convolution's is.

    The one with which the busiest multiprocessor is done first. Of doubles a thread's registers
    hold half as many.

    Args:
        kernel: "forward" or "input", a key of ``YIELDS``.
    """

    def cost(name: str) -> tuple[float, float]:
        tile = TILES[name]
        waves = -(-tile.blocks(m, n) * times // PROCESSORS)
        return waves * tile.area / YIELDS[kernel][name], tile.reads

    return TILES[min((name for name in YIELDS[kernel] if TILES[name].takes(itemsize)), key=cost)]


class Split(NamedTuple):
    tile: Tile
    splits: int
    each: int  # depth of a split: a multiple of _LEAST_DEPTH


def split_tile(m: int, n: int, depth: int, times: int) -> Split:
    """For a product with few numbers and much depth, ``times`` over: as a weight's gradient is.

    The depth is split until there are enough blocks, but no split has less than ``_LEAST_DEPTH``.
    Where it is split, the tile is the one that wastes least; else the one with which the busiest
    multiprocessor is done first.
    """

    def cost(name: str) -> tuple[float, float]:
        tile = TILES[name]
        blocks = tile.blocks(m, n) * times
        most = max(1, min(depth // _LEAST_DEPTH, MOST_SPLITS))
        waves = (
            max(blocks / PROCESSORS, 1 / most) if blocks < PROCESSORS else -(-blocks // PROCESSORS)
        )
        return waves * tile.area / YIELDS["weight"][name], tile.reads

    tile = TILES[min(YIELDS["weight"], key=cost)]
    blocks = tile.blocks(m, n) * times
    splits = 1
    if blocks < PROCESSORS:
        splits = max(1, min(-(-ENOUGH // blocks), depth // _LEAST_DEPTH, MOST_SPLITS))
    each = -(-depth // splits)
    each = -(-each // _LEAST_DEPTH) * _LEAST_DEPTH
    return Split(tile, -(-depth // each), each)
