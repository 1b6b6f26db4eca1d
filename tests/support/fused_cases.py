"""Fused convolutions to test with: kernels, pads, groups, and every kind of pooling behind them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from portacnn.ops.pool import pool_windows
from portacnn.ops.windows import Windows
from support.checks import (
    normal,
)

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    """As a layer has it; pads and ``ceil`` make windows that hang over the edge."""

    kernel: Numbers
    stride: Numbers
    padding: Any = 0
    dilation: Any = 1
    ceil: bool = False

    def windows(self, size: Numbers) -> Windows:
        return pool_windows(size, self.kernel, self.stride, self.padding, self.dilation, self.ceil)


@dataclass(frozen=True)
class Case:
    """One fused convolution. Everything is written out for every axis."""

    n: int
    cg: int  # channels in a group
    og: int  # outputs of a group
    size: Numbers
    kernel: Numbers
    stride: Numbers = ()
    pads: tuple[tuple[int, int], ...] = ()
    dilation: Numbers = ()
    groups: int = 1
    bias: bool = True
    pool: Pool | None = None
    plain: tuple = field(init=False)

    def __post_init__(self) -> None:
        axes = len(self.size)
        plain = (
            self.stride or (1,) * axes,
            self.pads or ((0, 0),) * axes,
            self.dilation or (1,) * axes,
            self.groups,
        )
        object.__setattr__(self, "plain", plain)

    @property
    def windows(self) -> Windows:
        stride, pads, dilation, _ = self.plain
        return Windows.of(self.size, self.kernel, stride, pads, dilation)

    def arguments(self) -> tuple:
        """What the op takes after x, weight and bias."""
        windows = self.windows
        return windows, self.groups, None if self.pool is None else self.pool.windows(windows.out)

    def arrays(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        weight = normal(self.og * self.groups, self.cg, *self.kernel, seed=seed + 1)
        bias = normal(len(weight), seed=seed + 2) if self.bias else None
        return normal(self.n, self.cg * self.groups, *self.size, seed=seed), weight, bias


TWO, THREE = Pool((2, 2), (2, 2)), Pool((3, 3), (3, 3))


CASES = {
    "plain": Case(3, 2, 3, (5, 6), (3, 3)),
    "1x1, no bias": Case(2, 3, 2, (3, 4), (1, 1), bias=False),
    "stride, asymmetric pads": Case(2, 2, 5, (5, 6), (3, 2), (2, 3), ((0, 2), (3, 1))),
    "pads larger than the kernel": Case(2, 1, 2, (2, 3), (2, 2), pads=((3, 4), (5, 2))),
    "dilation": Case(2, 1, 2, (7, 8), (3, 2), pads=((1, 1), (0, 2)), dilation=(2, 3)),
    "groups": Case(2, 2, 1, (4, 4), (2, 2), groups=3),
    "pool": Case(3, 2, 5, (6, 8), (3, 3), pool=TWO),
    "pool, no bias": Case(2, 2, 3, (6, 8), (3, 3), bias=False, pool=TWO),
    "pool leaves a row and a column out": Case(2, 2, 3, (7, 9), (3, 3), pool=TWO),
    "pool of 3 by 2": Case(
        2, 1, 2, (8, 7), (2, 2), pads=((1, 0), (0, 1)), pool=Pool((3, 2), (3, 2))
    ),
    "pool with gaps": Case(2, 1, 3, (8, 9), (2, 3), pool=Pool((2, 2), (3, 3))),
    "pool with gaps, one row left over": Case(2, 1, 3, (9, 10), (2, 3), pool=Pool((1, 2), (4, 3))),
    "pool overlapping": Case(2, 2, 2, (7, 8), (3, 3), pool=Pool((3, 3), (2, 2))),
    "pool hanging over the end": Case(
        2, 2, 2, (7, 8), (3, 3), pool=Pool((2, 2), (2, 2), ceil=True)
    ),
    "pool hanging over the start": Case(
        2, 2, 2, (7, 8), (3, 3), pool=Pool((2, 2), (2, 2), padding=1)
    ),
    "pool spread": Case(2, 1, 2, (8, 8), (2, 2), pool=Pool((2, 2), (3, 3), dilation=(2, 1))),
    "pool of everything": Case(2, 1, 2, (5, 5), (2, 2), pool=Pool((4, 4), (4, 4))),
    "pool of one": Case(2, 1, 2, (4, 4), (2, 2), pool=Pool((1, 1), (1, 1))),
    "pool, stride": Case(2, 3, 2, (9, 11), (3, 3), (2, 2), ((1, 1), (1, 1)), pool=TWO),
    "pool, dilation, pads": Case(
        2, 1, 2, (9, 8), (3, 2), (1, 2), ((2, 0), (0, 3)), (2, 3), pool=TWO
    ),
    "pool, groups": Case(2, 1, 2, (5, 5), (2, 2), groups=2, pool=TWO),
    "pool, pads larger than the kernel": Case(
        2, 1, 2, (3, 2), (2, 2), pads=((3, 4), (5, 3)), pool=THREE
    ),
    "a channel more than a block": Case(17, 3, 9, (4, 4), (3, 3), pads=((1, 1), (1, 1)), pool=TWO),
    "1d": Case(2, 2, 3, (9,), (3,), (2,), ((0, 3),), (2,)),
    "1d, pool": Case(2, 2, 3, (11,), (3,), pads=((1, 1),), pool=Pool((2,), (2,))),
    "1d, pool overlapping": Case(2, 1, 3, (11,), (3,), pool=Pool((3,), (2,))),
    "3d": Case(1, 2, 2, (3, 4, 3), (2, 2, 2), pads=((1, 0), (0, 1), (2, 0))),
    "3d, pool": Case(1, 2, 2, (5, 4, 5), (2, 1, 2), pool=Pool((2, 2, 2), (2, 2, 2))),
}
