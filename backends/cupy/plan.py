"""Blocking of matrix products on a GPU: the tile of a block, and the number of splits of the depth.
Plain numbers only.

Notation: a product has M rows, N columns and depth K. A GPU is full when each of its
multiprocessors has one or two blocks.
"""

from typing import NamedTuple

THREADS = 256
STEP = {4: 16, 8: 8}  # depth of a step by itemsize: STEP of cuda/tile.cuh
# elements in 16 bytes by itemsize; a thread reads so many at once if they are adjacent
VEC = {4: 4, 8: 2}
PROCESSORS = 132  # of an H100; the choice is not sensitive to it
ENOUGH = 3 * PROCESSORS  # blocks of a split product: as many as run at once
# depth of a split; with less, writing and adding partial sums costs more than it saves
_LEAST_DEPTH = 64
MOST_SPLITS = 512


class Tile(NamedTuple):
    """A tile: TM by TN elements per thread, TX threads side by side, the 256 threads of a block in
    SLICES slices.
    """

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
        """Return whether the elements of a thread fit into its registers."""
        return self.tm * self.tn * itemsize <= 256

    @property
    def area(self) -> int:
        return self.rows * self.columns

    @property
    def reads(self) -> float:
        """Return the elements that a block reads per product. It decides between tiles of equal
        cost.
        """
        return (self.rows + self.columns) / self.area

    @property
    def defines(self) -> dict[str, str | int]:
        return {"TM": self.tm, "TN": self.tn, "TX": self.tx, "SLICES": self.slices}

    def blocks(self, m: int, n: int) -> int:
        """Return the number of blocks that cover M by N."""
        return -(-m // self.rows) * -(-n // self.columns)

    def deep(self, itemsize: int) -> int:
        """Return the depth of a block's shared memory: BK of cuda/tile.cuh, for float32 and float64
        products.
        """
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
"""The fraction of a multiprocessor's arithmetic that a tile can use, relative to the best tile: the
fraction of multiply-adds among the instructions of its main loop (``scripts/gpu/sass.py
--yields``). Estimated, not measured: no GPU was available."""


def wide_tile(m: int, n: int, times: int, itemsize: int, kernel: str = "forward") -> Tile:
    """Return the tile of ``times`` products with few rows and many columns, such as a convolution.

    It minimizes the time of the busiest multiprocessor. For doubles, registers hold half as many
    elements.

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
    """Return tile and splits of ``times`` products with few results and a large depth, such as a
    weight gradient.

    The depth is split until there are enough blocks, with at least ``_LEAST_DEPTH`` per split. With
    splits, the tile that wastes least is chosen; without, the one that minimizes the time of the
    busiest multiprocessor.
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
