"""Convolution in groups on NumPy, depthwise among them: a few groups at a time, in the cache.

The inputs of a block are copied to a *panel*: with zeros for the padding, and with a stride, in
phases, so that the cells that one tap reads for a row of outputs lie side by side. The columns of
the block are copies of these runs, and one batched product combines them. The epilogue runs while
the outputs are in the cache. If rows are short, a run continues over the ends of rows; the elements
between two rows of outputs are then undefined.

The gradient of the input is the same computation on dy: the inputs of one phase of the stride are
read by the same taps, at the same distances.

Notation as in ops/conv.py; G groups. A, B: the channels of a group that are read and written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import numpy as np

from portacnn.backends.numpy import conv as dense
from portacnn.backends.numpy.epilogue import Epilogue, bind
from portacnn.backends.numpy.groups import by_groups
from portacnn.backends.numpy.memory import empty
from portacnn.backends.threads import in_parts, on_one_blas_thread, pieces
from portacnn.ops.fused import ConvNorm
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Windows
from portacnn.runtime import Kernel

_NEAR = (
    4 << 20
)  # bytes of the columns of a block: a part of the L3 cache, since a call takes microseconds
_PER_ELEMENT = 4  # multiply-adds that cost about as much as one element of a loop, with the copies
_SHORT = 1 << 10  # bytes of a row of outputs, below which runs continue over the ends of rows

Numbers = tuple[int, ...]


class _Axis(NamedTuple):
    """One axis of a panel: ``size`` cells of the source, with ``left`` zeros before them (if
    negative, the first cells are left out), in ``stride`` phases of ``span`` cells.
    """

    size: int
    left: int
    stride: int
    span: int

    def cells(self, phase: int) -> tuple[slice, slice]:
        """Return the cells of a phase that are copies, and the cells of the source."""
        start = max(0, -self.left)
        first = start + (phase - start - self.left) % self.stride
        to = (first + self.left) // self.stride
        count = max(0, min(-(-(self.size - first) // self.stride), self.span - to))
        return slice(to, to + count), slice(first, first + count * self.stride, self.stride)


class _Target(NamedTuple):
    """Outputs that the same taps compute.

    Attributes:
        where: their places in the result, per spatial axis.
        taps: the taps, as places in the kernel.
        reads: per tap and axis, the cell of the panel that the first output reads.
        out: the number of outputs per axis.
    """

    where: tuple[slice, ...]
    taps: Numbers
    reads: tuple[Numbers, ...]
    out: Numbers


@dataclass(frozen=True, eq=False)
class _Layout:
    """A panel (*STRIDE, *SPAN, N) of one channel, and what is computed from it."""

    axes: tuple[_Axis, ...]
    targets: tuple[_Target, ...]

    @cached_property
    def shape(self) -> Numbers:
        return (*(axis.stride for axis in self.axes), *(axis.span for axis in self.axes))


@lru_cache(maxsize=4096)
def _of_outputs(windows: Windows, first: int, last: int) -> _Layout:
    """Return the layout for the outputs from first to last of the first axis."""
    windows = windows.part(first, last)
    axes = tuple(
        _Axis(size, -start, s, ((o - 1) * s + (k - 1) * d) // s + 1)
        for size, start, s, o, k, d in zip(
            windows.size, windows.start, windows.stride, windows.out, windows.kernel,
            windows.dilation, strict=True,
        )
    )  # fmt: skip
    reads = tuple(
        tuple(i * d for i, d in zip(place, windows.dilation, strict=True))
        for place in product(*map(range, windows.kernel))
    )
    where = (slice(first, last), *(slice(0, o) for o in windows.out[1:]))
    return _Layout(axes, (_Target(where, tuple(range(len(reads))), reads, windows.out),))


@lru_cache(maxsize=4096)
def _of_inputs(windows: Windows, first: int, last: int) -> _Layout:
    """Return the layout for the gradients of the inputs. On the first axis, those from first*stride
    to last*stride.
    """
    axes, per_axis = [], []
    for i, (size, start, s, o, k, d) in enumerate(
        zip(
            windows.size, windows.start, windows.stride, windows.out, windows.kernel,
            windows.dilation, strict=True,
        )
    ):  # fmt: skip
        begin, end = (first, last) if i == 0 else (0, -(-size // s))
        phases = []
        for phase in range(min(s, size)):
            count = min(end, -(-(size - phase) // s)) - begin
            taps = [
                (j, begin + (phase - start - j * d) // s)
                for j in range(k)
                if (phase - start - j * d) % s == 0
            ]
            if count > 0:
                phases.append((slice(begin * s + phase, (begin + count) * s, s), count, taps))
        reads = [(read, count) for _, count, taps in phases for _, read in taps]
        lowest = min((read for read, _ in reads), default=0)
        span = max((read + count for read, count in reads), default=lowest + 1) - lowest
        axes.append(_Axis(o, -lowest, 1, span))
        per_axis.append([(w, c, [(j, r - lowest) for j, r in taps]) for w, c, taps in phases])
    targets = []
    for phases in product(*per_axis):
        where, out, taps = zip(*phases, strict=True)
        chosen, reads = [], []
        for tap in product(*taps):
            places, read = zip(*tap, strict=True)
            chosen.append(_index(places, windows.kernel))
            reads.append(read)
        targets.append(_Target(where, tuple(chosen), tuple(reads), out))
    return _Layout(tuple(axes), tuple(targets))


def _index(place: Numbers, shape: Numbers) -> int:
    index = 0
    for at, size in zip(place, shape, strict=True):
        index = index * size + at
    return index


def _fill(panel: np.ndarray, source: np.ndarray, axes: tuple[_Axis, ...]) -> None:
    """Copy source (C, *S, N) to panel (C, *STRIDE, *SPAN, N), with zeros around it."""
    for phase in np.ndindex(*(axis.stride for axis in axes)):
        own = panel[(slice(None), *phase)]
        cells = [axis.cells(f) for axis, f in zip(axes, phase, strict=True)]
        before: list[slice] = [slice(None)]
        for to, _ in cells:
            own[(*before, slice(0, to.start))] = 0
            own[(*before, slice(to.stop, None))] = 0
            before.append(to)
        own[tuple(before)] = source[(slice(None), *(come for _, come in cells))]


class _Read(NamedTuple):
    """How the columns of a target are read from a panel, in elements."""

    starts: Numbers  # of the taps
    grid: tuple[tuple[int, int], ...] | None  # or the number and distance of the taps per axis
    shape: Numbers  # of the outputs of a channel: one run, or (*OUT, N)
    strides: Numbers
    wide: Numbers  # the shape of an array of outputs, with the elements between rows


@lru_cache(maxsize=4096)
def _reading(layout: _Layout, number: int, n: int, exact: bool) -> _Read:
    axes, target = layout.axes, layout.targets[number]
    pitches = [n * prod(axis.span for axis in axes[i + 1 :]) for i in range(len(axes))]
    cells = n * prod(axis.span for axis in axes)
    starts = [
        _index(tuple(r % a.stride for r, a in zip(read, axes, strict=True)),
               tuple(a.stride for a in axes)) * cells
        + sum(r // a.stride * p for r, a, p in zip(read, axes, pitches, strict=True))
        for read in target.reads
    ]  # fmt: skip
    if exact:
        shape, strides, wide = (*target.out, n), (*pitches, 1), (*target.out, n)
    else:
        run = sum((o - 1) * p for o, p in zip(target.out, pitches, strict=True)) + n
        shape, strides = (run,), (1,)
        wide = (target.out[0], *(axis.span for axis in axes[1:]), n)
    return _Read(tuple(starts), _grid(target.reads, starts), shape, strides, wide)


def _grid(reads: tuple[Numbers, ...], starts: list[int]) -> tuple[tuple[int, int], ...] | None:
    """Return the number and the distance of the taps per axis, or None if they form no grid."""
    if not reads:
        return None
    counts = [len({read[i] for read in reads}) for i in range(len(reads[0]))]
    steps, apart = [], 1
    for count in reversed(counts):
        steps.insert(0, starts[apart] - starts[0] if count > 1 else 0)
        apart *= count
    for place, start in zip(np.ndindex(*counts), starts, strict=True):
        if start != starts[0] + sum(i * step for i, step in zip(place, steps, strict=True)):
            return None
    return tuple(zip(counts, steps, strict=True))


def _columns(panel: np.ndarray, read: _Read, buffer: np.ndarray) -> np.ndarray:
    """Return the columns (G, A*T, cells) of a panel (G, A, size)."""
    shape = (*panel.shape[:2], len(read.starts), *read.shape)
    columns = buffer[: prod(shape)].reshape(shape)
    sizes, item = panel.strides, panel.itemsize
    strides = tuple(stride * item for stride in read.strides)
    view = np.lib.stride_tricks.as_strided
    if read.grid is not None:
        counts = tuple(count for count, _ in read.grid)
        steps = tuple(step * item for _, step in read.grid)
        own = panel[:, :, read.starts[0] :]
        whole = (*shape[:2], *counts, *read.shape)
        columns.reshape(whole)[...] = view(own, whole, (*sizes[:2], *steps, *strides))
    else:
        for tap, start in enumerate(read.starts):
            own = panel[:, :, start:]
            columns[:, :, tap] = view(own, (*shape[:2], *read.shape), (*sizes[:2], *strides))
    return columns.reshape(shape[0], shape[1] * shape[2], -1)


class _Blocks(NamedTuple):
    """The blocking of a pass: the groups of each thread, the most of them in a block, the slices of
    the first spatial axis, and the number of elements of the columns of a block.
    """

    shares: list[slice]
    groups: int
    bands: list[slice]
    columns: int


def _blocks(groups: int, lines: int, line: int, itemsize: int, work: int) -> _Blocks:
    """Return the blocking. ``line``: the elements of the columns of one line of a group."""
    shares = pieces(groups, work)
    most = max(share.stop - share.start for share in shares)
    together = _NEAR // (line * itemsize)
    if together >= lines:
        count = min(together // lines, most)
        return _Blocks(shares, count, [slice(0, lines)], count * lines * line)
    size = -(-lines // -(-lines // max(together, 1)))
    bands = [slice(at, min(at + size, lines)) for at in range(0, lines, size)]
    return _Blocks(shares, 1, bands, size * line)


def _in_blocks(blocks: _Blocks, work: int, each: Callable[[int, slice, slice], None]) -> None:
    """Call ``each(thread, groups, band)`` for every block."""

    def share(thread: int) -> None:
        own = blocks.shares[thread]
        for at in range(own.start, own.stop, blocks.groups):
            for band in blocks.bands:
                each(thread, slice(at, min(at + blocks.groups, own.stop)), band)

    on_one_blas_thread(in_parts, share, len(blocks.shares), work)


# --- passes over all blocks -----------------------------------------------------------------------


def _is_plain(windows: Windows) -> bool:
    """Return whether the columns are the input itself: one tap, no stride, no padding."""
    return prod(windows.kernel) == 1 and windows.out == windows.size and windows.covers


def _flat(array: np.ndarray, groups: int, lines: slice) -> np.ndarray:
    """Return these lines of array (G*C, *S, N) as a view (G, C, cells)."""
    view = array.reshape(groups, len(array) // groups, array.shape[1], -1)[:, :, lines]
    return view.reshape(*view.shape[:2], -1)


def _panels(blocks: _Blocks, layout: _Layout, channels: int, n: int, dtype: Any) -> np.ndarray:
    """Allocate a panel for the channels of a group, for each thread and group of a block."""
    return empty((len(blocks.shares), blocks.groups, channels, prod(layout.shape) * n), dtype)


def _compute(
    source: np.ndarray,
    result: np.ndarray,
    weight: np.ndarray,
    windows: Windows,
    layout_of: Callable[[slice], _Layout],
    lines: int,
    epilogue: Epilogue,
) -> None:
    """Write result (G*B, *D, N) from source (G*A, *S, N).

    Args:
        weight: (G, B, A, T).
        layout_of: lines of the first spatial axis -> the layout. There are ``lines`` of them.
    """
    (groups, outputs, inputs, taps), n, dtype = weight.shape, source.shape[-1], source.dtype
    work = result.size * inputs * taps // _PER_ELEMENT
    layout, plain = layout_of(slice(0, lines)), _is_plain(windows)
    widest = max(layout.targets, key=lambda target: len(target.taps))
    row = prod(layout.axes[i].span for i in range(1, len(layout.axes))) * n
    exact = row * source.itemsize >= _SHORT
    line = max(inputs * len(widest.taps) * row, 1)
    blocks = _blocks(groups, lines, line, source.itemsize, work)
    threads, largest = len(blocks.shares), layout_of(blocks.bands[0])
    if not plain:
        panels = _panels(blocks, largest, inputs, n, dtype)
        buffers = empty((threads, blocks.columns), dtype)
    sums = empty((threads, blocks.groups * outputs * blocks.bands[0].stop * row), dtype)
    factors = {
        target.taps: np.ascontiguousarray(weight[..., target.taps]).reshape(
            groups, outputs, inputs * len(target.taps)
        )
        for target in layout.targets
    }
    first_axis_only = len(layout.targets) == 1 and exact
    end = None if epilogue.is_empty else bind(epilogue, result)

    def each(thread: int, some: slice, band: slice) -> None:
        here, count = layout_of(band), some.stop - some.start
        given = source[some.start * inputs : some.stop * inputs]
        rows = slice(some.start * outputs, some.stop * outputs)
        own = result[rows]
        if not plain:
            panel = panels[thread, :count, :, : prod(here.shape) * n]
            shaped = panel.reshape(count * inputs, *here.shape, n)
            _fill(shaped, given, here.axes)
            panel = shaped.reshape(count, inputs, -1)
        for number, target in enumerate(here.targets):
            part = own[(slice(None), *target.where)]
            if not target.taps:
                part[...] = 0
                continue
            factor = factors[target.taps][some]
            if plain:
                np.matmul(factor, _flat(given, count, band), out=_flat(own, count, band))
                continue
            read = _reading(here, number, n, exact)
            columns = _columns(panel, read, buffers[thread])
            if first_axis_only:
                np.matmul(factor, columns, out=_flat(own, count, band))
                continue
            buffer = sums[thread][: count * outputs * prod(read.wide)]
            buffer = buffer.reshape(count, outputs, -1)
            np.matmul(factor, columns, out=buffer[:, :, : columns.shape[2]])
            cells = (slice(None), *(slice(0, size) for size in target.out))
            part[...] = buffer.reshape(count * outputs, *read.wide)[cells]
        if end is not None:
            line = prod(result.shape[2:])
            flat = result.reshape(len(result), -1)
            end(flat, rows, slice(band.start * line, band.stop * line))

    _in_blocks(blocks, work, each)


def _forward(
    xt: np.ndarray, weight: np.ndarray, windows: Windows, groups: int, epilogue: Epilogue
) -> np.ndarray:
    """Return y (O, *OUT, N) for xt (C, *S, N)."""
    y = empty((len(weight), *windows.out, xt.shape[-1]), xt.dtype)
    matrices = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)

    def layout(band: slice) -> _Layout:
        return _of_outputs(windows, band.start, band.stop)

    _compute(xt, y, matrices, windows, layout, windows.out[0], epilogue)
    return y


def _input_gradient(
    dyt: np.ndarray, weight: np.ndarray, windows: Windows, groups: int
) -> np.ndarray:
    """Return dx (C, *S, N) for dyt (O, *OUT, N)."""
    outputs = weight.shape[1]
    dx = empty((groups * outputs, *windows.size, dyt.shape[-1]), dyt.dtype)
    matrices = weight.reshape(groups, len(weight) // groups, outputs, -1).swapaxes(1, 2)

    def layout(band: slice) -> _Layout:
        return _of_inputs(windows, band.start, band.stop)

    lines = -(-windows.size[0] // windows.stride[0])
    _compute(dyt, dx, matrices, windows, layout, lines, Epilogue())
    return dx


def _weight_gradient(
    xt: np.ndarray, dyt: np.ndarray, shape: Numbers, windows: Windows, groups: int, with_bias: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return dweight (O, A, *K) and dbias (O,)."""
    (o, inputs, *_), taps, n = shape, prod(windows.kernel), xt.shape[-1]
    row = prod(windows.out[1:]) * n
    work = dyt.size * inputs * taps // _PER_ELEMENT
    blocks = _blocks(groups, windows.out[0], inputs * taps * row, xt.itemsize, work)
    plain, outputs = _is_plain(windows), o // groups
    if not plain:
        largest = _of_outputs(windows, 0, blocks.bands[0].stop)
        panels = _panels(blocks, largest, inputs, n, xt.dtype)
        buffers = empty((len(blocks.shares), blocks.columns), xt.dtype)
    dweight = np.zeros((groups, outputs, inputs * taps), dtype=xt.dtype)
    dbias = np.zeros((groups, outputs), dtype=xt.dtype) if with_bias else None

    def each(thread: int, some: slice, band: slice) -> None:
        count = some.stop - some.start
        given = xt[some.start * inputs : some.stop * inputs]
        part = _flat(dyt[some.start * outputs : some.stop * outputs], count, band)
        if plain:
            columns = _flat(given, count, band)
        else:
            here = _of_outputs(windows, band.start, band.stop)
            panel = panels[thread, :count, :, : prod(here.shape) * n]
            panel = panel.reshape(count * inputs, *here.shape, n)
            _fill(panel, given, here.axes)
            read = _reading(here, 0, n, True)
            columns = _columns(panel.reshape(count, inputs, -1), read, buffers[thread])
        dweight[some] += np.matmul(part, columns.swapaxes(1, 2))
        if dbias is not None:
            dbias[some] += part.sum(axis=2)

    _in_blocks(blocks, work, each)
    return dweight.reshape(shape), None if dbias is None else dbias.reshape(o)


# --- the kernels ----------------------------------------------------------------------------------


class Saved(NamedTuple):
    """What a forward pass stores: x (C, *S, N)."""

    x: np.ndarray
    weight: np.ndarray
    with_bias: bool
    windows: Windows
    groups: int


def _declines(x: np.ndarray, windows: Windows) -> bool:
    return x.dtype.itemsize not in (4, 8) or not x.size or windows.sparse


def conv(
    x: np.ndarray, weight: np.ndarray, bias: Any, windows: Windows, groups: int, *, keep: bool
) -> Any:
    if _declines(x, windows):
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))
    y = _forward(xt, weight, windows, groups, Epilogue(shift=bias))
    return batch_first(y), Saved(xt, weight, bias is not None, windows, groups) if keep else None


def conv_backward(
    dy: np.ndarray,
    saved: Saved,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias, windows, groups = saved
    need_dbias = need_dbias and with_bias
    dyt = np.ascontiguousarray(batch_last(dy))
    dweight = dbias = None
    if need_dweight:
        dweight, dbias = _weight_gradient(x, dyt, weight.shape, windows, groups, need_dbias)
    elif need_dbias:
        dbias = dyt.reshape(len(dyt), -1).sum(axis=1)
    dx = batch_first(_input_gradient(dyt, weight, windows, groups)) if need_dx else None
    return dx, dweight, dbias


def conv_unit(
    parts: list[np.ndarray],
    weight: np.ndarray,
    bias: Any,
    windows: Windows,
    groups: int,
    norm: ConvNorm | None,
    low: float | None,
    high: float | None,
    pool: Windows | None,
) -> Any:
    """Compute ``conv_unit``. Declines pooling, which the portable op does after it."""
    x, *residual = parts
    if pool is not None or _declines(x, windows):
        return NotImplemented
    added = np.ascontiguousarray(batch_last(residual[0])) if residual else None
    epilogue = Epilogue.of(norm, bias, added, low, high)
    if epilogue.scale is not None:
        weight = weight * epilogue.scale.reshape(-1, *(1,) * (weight.ndim - 1))
        epilogue = epilogue._replace(scale=None)
    xt = np.ascontiguousarray(batch_last(x))
    return batch_first(_forward(xt, weight, windows, groups, epilogue))


KERNELS = by_groups(
    dense.KERNELS,
    {"conv": Kernel(conv, conv_backward), "conv_unit": Kernel(conv_unit)},
    Saved,
)
