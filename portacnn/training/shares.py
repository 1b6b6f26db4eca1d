"""The split of each batch: into parts that run one after the other (``accumulate``), and each part
among the processes of a training run. One process without parts has the whole batch.

Notation: B images in a batch, of all processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from portacnn.runtime import Array, HostArray, backend_of


def batch_sizes(count: int, size: int, drop_last: bool) -> list[int]:
    """Return the size of each batch of an epoch. The last holds the rest, unless dropped."""
    rest = [] if drop_last or not count % size else [count % size]
    return [size] * (count // size) + rest


def part_sizes(count: int, most: int) -> list[int]:
    """Split ``count`` images into the fewest parts of at most ``most``; sizes differ by one image
    at most."""
    return spread(count, -(-count // most))


def spread(count: int, parts: int, first: int = 0) -> list[int]:
    """Split ``count`` into ``parts`` numbers that differ by 1 at most; the larger ones begin with
    number ``first``."""
    size, larger = divmod(count, parts)
    return [size + ((number - first) % parts < larger) for number in range(parts)]


@dataclass(frozen=True)
class Share:
    """A process's images of a batch.

    Attributes:
        count: B.
        parts: for each part of the batch, the position in the batch of the process's first image,
            and the number of its images. They follow one another.
        before: the number of images that come along before those of each part, because augmentation
            mixes them with these (``Transform.looks_back``).
    """

    count: int
    parts: tuple[tuple[int, int], ...]
    before: int = 0

    @property
    def rows(self) -> int:
        """The number of images that the process reads."""
        return sum(size + self.before for _, size in self.parts)

    def positions(self) -> list[int]:
        """Return the positions in the batch of the images that the process reads. Before the first
        image of a batch comes its last."""
        return [
            position % self.count
            for first, size in self.parts
            for position in range(first - self.before, first + size)
        ]

    def own(self, x: Array) -> Array:
        """Return x (rows, ...) without the images that came along."""
        if not self.before:
            return x
        parts, last = [], 0
        for _, size in self.parts:
            last += self.before + size
            parts.append(x[last - size : last, ...])
        return parts[0] if len(parts) == 1 else backend_of(x).xp.concat(parts, axis=0)


@dataclass(frozen=True)
class Split:
    """How batches are split.

    Attributes:
        most: the number of images of a part, at most.
        rank, ranks: the number of this process, and of all.
        before: see ``Share``; 0 for one process, which has all images of a batch.
    """

    most: int
    rank: int = 0
    ranks: int = 1
    before: int = 0

    def of(self, count: int) -> Share:
        """Return this process's share of a batch. Processes' shares differ by one image at most."""
        return _share(self, count)

    def epoch(self, order: HostArray, sizes: Sequence[int]) -> tuple[HostArray, list[int]]:
        """Return which images this process reads in an epoch, or in the rest of one, in their
        order, and how many of them in each batch.

        Args:
            order: indices of the images, of all batches.
            sizes: of the batches.
        """
        if self.ranks == 1:
            return order, list(sizes)
        shares = {size: self.of(size) for size in set(sizes)}
        read = [
            begin + position
            for begin, size in zip(accumulate(sizes, initial=0), sizes, strict=False)
            for position in shares[size].positions()
        ]
        return order[read], [shares[size].rows for size in sizes]


@lru_cache(maxsize=64)
def _share(split: Split, count: int) -> Share:
    parts, begin, larger = [], 0, 0
    for part in part_sizes(count, split.most):
        sizes = spread(part, split.ranks, larger)
        parts.append((begin + sum(sizes[: split.rank]), sizes[split.rank]))
        begin, larger = begin + part, larger + part % split.ranks
    return Share(count, tuple(parts), split.before)
