"""Joins of several paths of a network: concatenation along the channels, and addition.

Addition passes the same gradient to every path, so it needs no backward function. No function
changes its arguments.

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
    """Concatenate (N, C1, *S), (N, C2, *S), ... to (N, C1 + C2 + ..., *S), in the backend's memory
    layout.

    Raises:
        ShapeError: if the parts differ in more than their channels.
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
    """Split x (N, C1 + C2 + ..., *S) into views (N, C1, *S), (N, C2, *S), ...: the backward pass of
    ``concat_channels``.

    Raises:
        ShapeError: if the channels of x are not the sum of ``counts``.
    """
    if x.shape[1] != sum(counts):
        raise ShapeError(f"expected {sum(counts)} channels, got {describe(x)}")
    return [
        x[:, end - count : end, ...] for count, end in zip(counts, accumulate(counts), strict=True)
    ]


def check_add(parts: list[Array], **options: Any) -> None:
    """Raise ShapeError if the parts differ in shape."""
    _check_alike(parts, [part.shape for part in parts], "of one shape")


@op(check_add)
def add(parts: list[Array]) -> Array:
    """Return the sum of arrays of one shape, without broadcasting. Raises ShapeError if they
    differ.
    """
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _check_alike(parts: Sequence[Array], keys: Sequence[object], what: str) -> None:
    if any(key != keys[0] for key in keys):
        raise ShapeError(
            f"expected paths that meet to be {what}, got {'; '.join(map(describe, parts))}"
        )
