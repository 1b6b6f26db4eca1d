"""Padding: a wider array with the input in its middle, and margins that are constant or repeat what
lies inside.

Every margin is a copy of one slice of the same axis, which is all that tells the modes apart. For
the axis 1 2 3 4 with two cells on either side:

    constant    0 0 | 1 2 3 4 | 0 0     of nothing
    reflect     3 2 | 1 2 3 4 | 3 2     of the cells beyond the edge's own, turned round
    replicate   1 1 | 1 2 3 4 | 4 4     of the edge, spread
    circular    3 4 | 1 2 3 4 | 1 2     of the cells at the other end

The axes are padded one after the other, each over the whole breadth that those before it have got,
which makes the corners. The backward folds them back: each margin's gradient, over the whole
breadth again, is added to where it was copied from, and as every axis is folded on its own, in any
order.
"""

from collections.abc import Iterator, Sequence

from portacnn.arguments import as_int, listed
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.ops.dispatch import Cache, check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Pads, check_pads
from portacnn.runtime import Array, backend_of, describe

MODES = ("constant", "reflect", "replicate", "circular")


@op()
def pad_axes(
    x: Array, pads: Pads, mode: str, value: float, *, keep: bool
) -> tuple[Array, tuple | None]:
    """x (N, C, *S) -> y, with ``pads`` (before, after) for every axis of x. The op behind
    ``pad``."""
    xp = backend_of(x).xp
    xt, pads = batch_last(x), (*pads[1:], pads[0])
    y = xp.full(_widened(xt.shape, pads), value, dtype=x.dtype, device=x.device)
    y[_middle(xt.shape, pads)] = xt
    for margin, source in _margins(xt.shape, pads, mode):
        y[margin] = xp.flip(y[source], axis=_axis(margin)) if mode == "reflect" else y[source]
    return batch_first(y), (tuple(xt.shape), pads, mode) if keep else None


@pad_axes.backward
def pad_backward(dy: Array, saved: tuple) -> Array:
    """The gradient dx of ``pad``: each input's own, and those of all cells that were copied from
    it."""
    shape, pads, mode = saved
    xp = backend_of(dy).xp
    dy = batch_last(dy)
    if mode != "constant":
        dy = xp.asarray(dy, copy=True)
    for margin, source in _margins(shape, pads, mode):
        share, axis = dy[margin], _axis(margin)
        if mode == "reflect":
            share = xp.flip(share, axis=axis)
        elif mode == "replicate":
            share = xp.sum(share, axis=axis, keepdims=True)
        dy[source] += share
    return batch_first(dy[_middle(shape, pads)])


def _widened(shape: Sequence[int], pads: Pads) -> tuple[int, ...]:
    return tuple(n + before + after for n, (before, after) in zip(shape, pads, strict=True))


def _middle(shape: Sequence[int], pads: Pads) -> tuple[slice, ...]:
    return tuple(slice(before, before + n) for n, (before, _) in zip(shape, pads, strict=True))


def _margins(
    shape: Sequence[int], pads: Pads, mode: str
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """For every margin, in the order in which they are filled: (its cells in y, the cells of y that
    it copies)."""
    if mode == "constant":
        return
    for axis, (n, (b, a)) in enumerate(zip(shape, pads, strict=True)):
        end = b + n  # the middle is y[b:end]
        if mode == "reflect":
            sources = (slice(b + 1, b + 1 + b), slice(end - 1 - a, end - 1))
        elif mode == "replicate":
            sources = (slice(b, b + 1), slice(end - 1, end))
        else:
            sources = (slice(end - b, end), slice(b, b + a))
        for margin, source in zip((slice(0, b), slice(end, end + a)), sources, strict=True):
            if margin.start < margin.stop:
                before, after = (slice(None),) * axis, (slice(None),) * (len(shape) - axis - 1)
                yield (*before, margin, *after), (*before, source, *after)


def _axis(margin: tuple[slice, ...]) -> int:
    """The axis that a margin lies on: the only one it does not take whole."""
    return next(axis for axis, cells in enumerate(margin) if cells != slice(None))


# --- the public face ------------------------------------------------------------------------------


def pad(
    x: Array, pad: Sequence[int], mode: str = "constant", value: float = 0.0, *, keep: bool = True
) -> tuple[Array, Cache | None]:
    """Widen the last axes of x, as torch.nn.functional.pad.

    Args:
        x: any shape, floating point.
        pad: how many cells, two numbers for each axis and the last axis first: (left, right, top,
            bottom, ...).
        mode: "constant"; "reflect", which wants fewer cells than the axis has; "replicate"; or
            "circular", which wants at most as many as it has.
        value: for "constant".
        keep: keep what ``pad_backward`` needs.

    Returns:
        y of the widened shape, and the cache.

    Raises:
        ArgumentError: an unknown mode, an odd count of numbers, negative ones; a value where none
            is used.
        ShapeError: more pads than axes, or wider than the mode allows.
        ArrayError: integers.
    """
    check_arrays("pad", x=x)
    pads = _pairs(x, pad)
    if mode not in MODES:
        raise ArgumentError(
            f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}", "pad"
        )
    if mode != "constant" and value != 0:
        raise ArgumentError(
            f"a value is for mode='constant' only; got {value!r} with mode={mode!r}", "pad"
        )
    try:
        check_pads(x.shape, pads, mode)
    except PortacnnError as error:
        raise error.at("pad")
    return pad_axes(x, pads, mode, value, keep=keep)


def _pairs(x: Array, pad: Sequence[int]) -> Pads:
    """torch's flat order, last axis first -> (before, after) for every axis of x, first axis
    first."""
    pad = listed(pad)
    if not isinstance(pad, Sequence) or isinstance(pad, str) or len(pad) % 2:
        raise ArgumentError(
            f"pad must be two whole numbers for each axis, last axis first; got {pad!r}", "pad"
        )
    if any((number := as_int(n)) is None or number < 0 for n in pad):
        raise ArgumentError(f"pad must be whole numbers of at least 0, got {pad!r}", "pad")
    if len(pad) > 2 * x.ndim:
        raise ShapeError(
            f"expected at most {2 * x.ndim} numbers, got {tuple(pad)} (input {describe(x)})", "pad"
        )
    pairs = [(int(before), int(after)) for before, after in zip(pad[::2], pad[1::2], strict=True)]
    return ((0, 0),) * (x.ndim - len(pairs)) + tuple(reversed(pairs))
