"""Where paths of a network meet: arrays set side by side along the channels, or added; and the way
back.

Adding hands every path the same gradient, so it needs no backward. Neither changes what it is
given.

Notation: N batch, C channels, S any further axes.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from portacnn.errors import ShapeError
from portacnn.ops.dispatch import op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.runtime import Array, backend_of, describe


def concat_channels(parts: Sequence[Array]) -> Array:
    """(N, C1, *S), (N, C2, *S), ... -> (N, C1 + C2 + ..., *S), in memory as the backend prefers.

    Raises:
        ShapeError: the parts differ in more than their channels.
    """
    _check_alike(
        parts,
        [(part.shape[:1], part.shape[2:]) for part in parts],
        "of the same batch and spatial size",
    )
    if len(parts) == 1:
        return parts[0]
    backend = backend_of(parts[0])
    if backend.layout == "batch_first":
        return backend.xp.concat(list(parts), axis=1)
    return batch_first(backend.xp.concat([batch_last(part) for part in parts], axis=0))


def split_channels(x: Array, counts: Sequence[int]) -> list[Array]:
    """The backward of ``concat_channels``: (N, C1 + C2 + ..., *S) -> (N, C1, *S), (N, C2, *S), ...:
    views.

    Raises:
        ShapeError: x has not as many channels as the counts add up to.
    """
    if x.shape[1] != sum(counts):
        raise ShapeError(f"expected {sum(counts)} channels, got {describe(x)}")
    return [
        x[:, end - count : end, ...] for count, end in zip(counts, accumulate(counts), strict=True)
    ]


def check_add(parts: list[Array], **options: Any) -> None:
    """Raise ShapeError where they differ in shape."""
    _check_alike(parts, [part.shape for part in parts], "of one shape")


@op(check_add)
def add(parts: list[Array]) -> Array:
    """The sum of arrays of one shape: nothing is broadcast. Raises ShapeError where they differ."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _check_alike(parts: Sequence[Array], keys: Sequence[object], what: str) -> None:
    if any(key != keys[0] for key in keys):
        raise ShapeError(
            f"expected paths that meet to be {what}, got {'; '.join(map(describe, parts))}"
        )
