"""The geometry of one convolution on CUDA and its plan: the tiles and how the depth is traversed.

Notation as in ops/conv.py. Plain numbers only.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from portacnn.backends.cupy.plan import STEP, Split, Tile, split_tile, wide_tile
from portacnn.ops.windows import Plane, Windows

VALUE_BY_VALUE, BY_TAP, WHOLE_STEPS = 0, 1, 2  # traversal of the depth: BY_TAP of cuda/conv.cu
FEW = 4  # channels per group, in and out; with more, matrix product tiles waste less
_MOST = 2**31 - 1


class Plan(NamedTuple):
    """The launch parameters of a convolution of one geometry and batch size."""

    sizes: Plane
    groups: int
    numbers: tuple[np.int32, ...]  # the sizes
    taps: int
    wide: Tile  # of the forward pass
    back: Tile  # of the input gradient
    split: Split  # of the weight gradient
    forward_walk: int  # BY_TAP of cuda/conv.cu
    input_walk: int
    few: bool  # few channels per group: groups.py computes it

    @property
    def cells(self) -> int:
        return self.sizes.oh * self.sizes.ow * self.sizes.n


@lru_cache(maxsize=1024)
def plan_of(
    windows: Windows, c: int, o: int, groups: int, n: int, pooled: bool, itemsize: int
) -> Plan | None:
    """Return the plan of a convolution from C to O channels. None if indices do not fit into 32
    bits, or the grid is too large.
    """
    sizes = Plane.of(windows, c // groups, o // groups, n)
    h, w, oh, ow = sizes.h, sizes.w, sizes.oh, sizes.ow
    cells, taps, phases = oh * ow * n, sizes.kh * sizes.kw, sizes.sh * sizes.sw
    # Includes the parts of tiles beyond the end, and the padding.
    reach = (h + sizes.kh * sizes.dh + sizes.top) * (w + sizes.kw * sizes.dw + sizes.left)
    largest = max(c * h * w * n, o * cells + 512 * o, o * c * taps, reach * n)
    split = split_tile(sizes.o, sizes.c * taps + 1, cells, groups)
    if largest > _MOST // 2 or groups * max(phases, split.splits) > 65535 or max(c, o) > 65535:
        return None
    # With pooling too, all outputs are computed, except a last row or column without a window.
    seen = (oh // 2) * (ow // 2) * 4 * n if pooled else cells
    wide = wide_tile(sizes.o, seen, groups, itemsize)
    back = wide_tile(
        sizes.c, -(-h // sizes.sh) * -(-w // sizes.sw) * n, groups * phases, itemsize, "input"
    )
    numbers = tuple(np.int32(size) for size in sizes)
    walks = _walk(sizes.c, wide, itemsize), max(_walk(sizes.o, back, itemsize), BY_TAP)
    few = few_channels(sizes.c, sizes.o, groups)
    return Plan(sizes, groups, numbers, taps, wide, back, split, *walks, few)


def _walk(channels: int, tile: Tile, itemsize: int) -> int:
    """Return BY_TAP, unless at least a third of the last step's channels would be padding."""
    whole = -(-channels // STEP[itemsize]) * STEP[itemsize]
    if channels == whole and tile.slices == 1:
        return WHOLE_STEPS
    return BY_TAP if 3 * channels >= 2 * whole else VALUE_BY_VALUE


def few_channels(c: int, o: int, groups: int) -> bool:
    """Return whether a convolution with C in-channels and O out-channels per group uses the kernels
    of groups.cu.
    """
    return groups > 1 and max(c, o) <= FEW
