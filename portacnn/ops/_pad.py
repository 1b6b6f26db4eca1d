"""Padding: a wider array with the input in its middle and margins that are constant or copied from
the input.

Every margin is a copy of one slice of the same axis. The modes differ only in the slice. For the
axis 1 2 3 4 with two cells on either side:

    constant    0 0 | 1 2 3 4 | 0 0     no copy
    reflect     3 2 | 1 2 3 4 | 3 2     the cells next to the edge cell, reversed
    replicate   1 1 | 1 2 3 4 | 4 4     the edge cell, repeated
    circular    3 4 | 1 2 3 4 | 1 2     the cells at the other end

The axes are padded one after the other. Each copy spans the axes that are padded already; this
fills the corners. The backward pass adds the gradient of each margin to the slice that it was
copied from, one axis at a time. The order of the axes does not matter.
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
    """Pad x (N, C, *S) by ``pads``, (before, after) for every axis of x. The op behind ``pad``."""
    xp = backend_of(x).xp
    xt, pads = batch_last(x), (*pads[1:], pads[0])
    y = xp.full(_widened(xt.shape, pads), value, dtype=x.dtype, device=x.device)
    y[_middle(xt.shape, pads)] = xt
    for margin, source in _margins(xt.shape, pads, mode):
        y[margin] = xp.flip(y[source], axis=_axis(margin)) if mode == "reflect" else y[source]
    return batch_first(y), (tuple(xt.shape), pads, mode) if keep else None


@pad_axes.backward
def pad_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient dx of ``pad``: for each input cell, its own gradient plus those of its
    copies.
    """
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


pad_axes.on_complex(pad_axes.forward, pad_axes.portable_backward)


def _widened(shape: Sequence[int], pads: Pads) -> tuple[int, ...]:
    return tuple(n + before + after for n, (before, after) in zip(shape, pads, strict=True))


def _middle(shape: Sequence[int], pads: Pads) -> tuple[slice, ...]:
    return tuple(slice(before, before + n) for n, (before, _) in zip(shape, pads, strict=True))


def _margins(
    shape: Sequence[int], pads: Pads, mode: str
) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Yield for every margin, in the order in which they are filled, (its cells in y, the cells of
    y that it copies).
    """
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
    """Return the axis of a margin: the only one of which it is a part."""
    return next(axis for axis, cells in enumerate(margin) if cells != slice(None))


# --- the public face ------------------------------------------------------------------------------


def pad(
    x: Array, pad: Sequence[int], mode: str = "constant", value: float = 0.0, *, keep: bool = True
) -> tuple[Array, Cache | None]:
    """Widen the last axes of x, as torch.nn.functional.pad.

    Args:
        x: any shape, floating point or complex.
        pad: the number of cells to add: two integers per axis, the last axis first (left, right,
            top, bottom, ...).
        mode: ``"constant"``; ``"reflect"`` (fewer cells than the axis has); ``"replicate"``; or
            ``"circular"`` (at most as many cells as the axis has).
        value: the value of the new cells in mode ``"constant"``.
        keep: store what ``pad_backward`` needs.

    Returns:
        y of the widened shape, and the cache.

    Raises:
        ArgumentError: if the mode is unknown, if pad has an odd length or negative elements, or if
            a value is given in a mode that does not use it.
        ShapeError: if there are more pads than axes, or a margin is wider than the mode allows.
        ArrayError: if x is not floating point.

    Example:
        >>> y, cache = ops.pad(np.array([1.0, 2.0, 3.0]), (2, 1), mode="reflect")
        >>> y
        array([3., 2., 1., 2., 3., 2.])
        >>> ops.pad_backward(np.ones(6), cache)
        array([1., 3., 2.])
    """
    check_arrays("pad", linear=True, x=x)
    pads = _pairs(x, pad)
    if mode not in MODES:
        raise ArgumentError(
            f"mode must be one of {', '.join(map(repr, MODES))}; got {mode!r}", "pad"
        )
    if mode != "constant" and value != 0:
        raise ArgumentError(
            f"value={value!r} needs mode='constant', got mode={mode!r}; leave value out", "pad"
        )
    try:
        check_pads(x.shape, pads, mode)
    except PortacnnError as error:
        raise error.at("pad")
    return pad_axes(x, pads, mode, value, keep=keep)


def _pairs(x: Array, pad: Sequence[int]) -> Pads:
    """Convert torch's flat order, last axis first, to (before, after) for every axis of x, first
    axis first.
    """
    pad = listed(pad)
    if not isinstance(pad, Sequence) or isinstance(pad, str) or len(pad) % 2:
        raise ArgumentError(
            f"pad must be two whole numbers per axis, last axis first; got {pad!r}", "pad"
        )
    if any((number := as_int(n)) is None or number < 0 for n in pad):
        raise ArgumentError(f"pad must be whole numbers of at least 0, got {pad!r}", "pad")
    if len(pad) > 2 * x.ndim:
        raise ShapeError(
            f"expected a pad of at most {2 * x.ndim} numbers, got {tuple(pad)} (input "
            f"{describe(x)})",
            "pad",
        )
    pairs = [(int(before), int(after)) for before, after in zip(pad[::2], pad[1::2], strict=True)]
    return ((0, 0),) * (x.ndim - len(pairs)) + tuple(reversed(pairs))
