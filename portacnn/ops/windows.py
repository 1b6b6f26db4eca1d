"""Sliding windows: which inputs each tap of a kernel reads for which outputs. Used by convolution
and pooling.

Notation: S the spatial axes (W; H, W; or D, H, W), T the taps of a kernel (KH*KW of them in two
dimensions), OUT the spatial axes of the output. Ops see activations batch-last, (C, *S, N): see
``layout``.

Consider one tap, at offset k of its kernel. Output o reads input ``o*stride + k*dilation - pad``
there, if that lies inside the input. The outputs that read an input form one contiguous range, and
their inputs form one slice with step ``stride``. A tap is therefore a pair of slices, both in
bounds, and no padded array is needed: the outputs outside the range read zeros (convolution) or
nothing (pooling).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

from portacnn.arguments import LARGEST, as_int, listed, told
from portacnn.errors import ArgumentError, ShapeError
from portacnn.ops.dispatch import op
from portacnn.runtime import Array, backend_of

Padding = int | str | Sequence[int] | Sequence[tuple[int, int]]
_MOST_CELLS = 1 << 48
AXES = {1: "length", 2: "height x width", 3: "depth x height x width"}


@dataclass(frozen=True)
class Tap:
    """One offset of the kernel: ``x[reads]``, inputs of (C, *S, N), are read by the outputs
    ``y[reaches]``.
    """

    index: int
    reads: tuple[slice, ...]
    reaches: tuple[slice, ...]


@dataclass(frozen=True, eq=False)
class Windows:
    """The geometry of one convolution or pooling for one input size. ``Windows.of`` creates, checks
    and caches it.
    """

    size: tuple[int, ...]  # S, the input's spatial extent
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]  # (before, after) on each axis
    dilation: tuple[int, ...]
    out: tuple[int, ...]  # OUT
    start: tuple[int, ...]  # start of the first window per axis, negative in the padding

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """The taps that read any input. They are listed on first use, because a kernel may have
        millions.
        """
        axis_taps = [
            [_axis_tap(start + k * d, s, n, o) for k in range(kk)]
            for kk, d, s, start, n, o in zip(
                self.kernel,
                self.dilation,
                self.stride,
                self.start,
                self.size,
                self.out,
                strict=True,
            )
        ]
        everything = slice(None)
        taps = []
        for index, ranges in enumerate(product(*axis_taps)):
            if None not in ranges:
                reads, reaches = zip(*ranges, strict=True)
                taps.append(
                    Tap(index, (everything, *reads, everything), (everything, *reaches, everything))
                )
        return tuple(taps)

    @cached_property
    def covers(self) -> bool:
        """Whether every output reads an input at every tap: no window extends into the padding."""
        return all(
            start >= 0 and start + (o - 1) * s + (k - 1) * d < n
            for start, o, s, k, d, n in zip(
                self.start,
                self.out,
                self.stride,
                self.kernel,
                self.dilation,
                self.size,
                strict=True,
            )
        )

    @cached_property
    def blind(self) -> bool:
        """Whether some output reads no input."""
        return any(
            map(_is_blind, self.start, self.out, self.stride, self.kernel, self.dilation, self.size)
        )

    @cached_property
    def extent(self) -> tuple[int, ...]:
        """The size of the region that the windows span, from the first cell of the first window to
        the last of the last.
        """
        return tuple(
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(self.out, self.stride, self.dilation, self.kernel, strict=True)
        )

    @cached_property
    def sparse(self) -> bool:
        """Whether the windows read less than a sixteenth of the region that they span (long strides
        or dilation).

        Then a copy of the whole region, padding included, costs too much memory. The ops then touch
        only the cells that are read, tap by tap.
        """
        return prod(self.extent) > 16 * prod(self.out) * prod(self.kernel)

    def part(self, first: int, last: int) -> "Windows":
        """Return the same windows for the outputs first <= o < last of the first spatial axis,
        counted from 0.
        """
        return _part(self, first, last)

    @staticmethod
    def of(
        size: Sequence[int],
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
    ) -> "Windows":
        """Check the arguments and return the geometry. Results are cached.

        Args:
            size: the spatial size of the input.
            kernel, stride, dilation: an integer, or one per axis.
            padding: an integer, one per axis, a pair (before, after) per axis, ``"valid"``, or
                ``"same"`` (output ceil(input / stride); an odd cell goes to the end).
            ceil_mode: add a last window that extends beyond the end, if it starts before the end of
                the input (as in PyTorch).

        Raises:
            ArgumentError: if an argument is invalid.
            ShapeError: if the kernel is larger than the padded input.
        """
        pads = padding if isinstance(padding, str) else _whole("padding", padding)
        return _windows(
            tuple(size),
            _whole("kernel_size", kernel),
            _whole("stride", stride),
            pads,
            _whole("dilation", dilation),
            bool(ceil_mode),
        )

    @staticmethod
    def transposed(
        size: Sequence[int],
        kernel: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
    ) -> "Windows":
        """Return the geometry of the convolution from the output of a transposed convolution to its
        input ``size``.

        Its ``out`` is ``size``. Its ``size`` is the output of the transposed convolution, (n -
        1)*stride - before - after + dilation*(k - 1) + output_padding + 1.

        Raises:
            ArgumentError: if an argument is invalid, output_padding is below neither the stride nor
                the dilation, or padding is a string.
            ShapeError: if the output would be empty.
        """
        if isinstance(padding, str):
            raise ArgumentError(
                f"padding of a transposed convolution must be whole numbers, got {padding!r}"
            )
        return _transposed(
            tuple(size),
            _whole("kernel_size", kernel),
            _whole("stride", stride),
            _whole("padding", padding),
            _whole("output_padding", output_padding),
            _whole("dilation", dilation),
        )


def _whole(name: str, value: Any) -> Any:
    """Convert integers of any library to ``int`` and sequences to tuples, as keys of the cache (2
    and 2.0 are one key).
    """
    if type(value) is int:
        return value
    value = listed(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_whole(name, v) for v in value)
    if (number := as_int(value)) is None:
        raise ArgumentError(f"{name} must be whole numbers, got {told(value)}")
    return number


def per_axis(name: str, value: Any, axes: int, least: int) -> tuple[int, ...]:
    """Return ``value`` as a tuple of one integer per axis: ``3`` -> (3, 3). Raises ArgumentError if
    the count is wrong or an integer is below ``least``.
    """
    whole = _whole(name, value)
    values = whole if isinstance(whole, tuple) else (whole,) * axes
    if len(values) != axes or not all(isinstance(v, int) for v in values):
        raise ArgumentError(
            f"{name} must be a whole number or {axes} of them ({AXES.get(axes, '')}), got {value!r}"
        )
    if any(v < least for v in values):
        raise ArgumentError(f"{name} must be at least {least}, got {told(value)}")
    if any(v > LARGEST for v in values):
        raise ArgumentError(f"{name} must be at most {LARGEST}, got {told(value)}")
    return values


def pads_of(
    padding: Padding,
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """Convert every form of ``padding`` to a pair (before, after) per axis."""
    axes, padding = len(size), listed(padding)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * axes
        if padding == "same":
            pads = []
            for n, k, s, d in zip(size, kernel, stride, dilation, strict=True):
                total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
                pads.append((total // 2, total - total // 2))
            return tuple(pads)
        raise ArgumentError(f'padding must be numbers, "valid" or "same"; got {padding!r}')
    if (
        isinstance(padding, Sequence)
        and len(padding) == axes
        and all(isinstance(p, Sequence) for p in padding)
    ):
        sides = [per_axis("padding (before, after)", p, 2, 0) for p in padding]
        return tuple((before, after) for before, after in sides)
    return tuple((p, p) for p in per_axis("padding", padding, axes, 0))


def check_output_padding(
    output_padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> None:
    """Raise ArgumentError if output_padding is below neither the stride nor the dilation on some
    axis.
    """
    if any(o >= max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise ArgumentError(
            "output_padding must be below the stride or the dilation; got "
            f"{_times(output_padding)} "
            f"with stride {_times(stride)} and dilation {_times(dilation)}"
        )


def check_pads(shape: Sequence[int], pads: "Pads", mode: str) -> None:
    """Raise ShapeError if an axis has too few cells to fill its margins in this mode."""
    for n, (before, after) in zip(shape, pads, strict=True):
        wanted = max(before, after)
        if mode == "reflect" and wanted >= max(n, 1):
            raise ShapeError(
                f"mode='reflect' can add at most {max(n - 1, 0)} cells to {n}, got "
                f"{(before, after)}"
            )
        if mode == "circular" and wanted > n:
            raise ShapeError(
                f"mode='circular' can add at most {n} cells to {n}, got {(before, after)}"
            )
        if mode == "replicate" and wanted and not n:
            raise ShapeError(
                f"mode='replicate' needs at least 1 cell, got {n} with padding {(before, after)}"
            )


AxisTap = tuple[slice, slice]
Numbers = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


@lru_cache(maxsize=4096)
def _windows(
    size: Numbers, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Windows:
    axes = len(size)
    kernel = per_axis("kernel_size", kernel, axes, 1)
    stride = per_axis("stride", stride, axes, 1)
    dilation = per_axis("dilation", dilation, axes, 1)
    pads = pads_of(padding, size, kernel, stride, dilation)
    extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
    padded = tuple(n + before + after for n, (before, after) in zip(size, pads, strict=True))
    out = []
    for n, p, e, s, (before, _) in zip(size, padded, extent, stride, pads, strict=True):
        count = (p - e + (s - 1 if ceil_mode else 0)) // s + 1
        if ceil_mode and (count - 1) * s >= n + before:
            count -= 1
        out.append(count)
    if min(out) < 1 or 0 in size:
        spread = f", dilated to {_times(extent)}," if extent != kernel else ""
        around = f", padded to {_times(padded)}" if padded != size else ""
        raise ShapeError(
            f"kernel {_times(kernel)}{spread} is larger than the input {_times(size)}{around}; "
            "use a smaller kernel, more padding or a larger input"
        )
    return _laid(size, kernel, stride, pads, dilation, tuple(out))


@lru_cache(maxsize=4096)
def _transposed(
    size: Numbers, kernel: Any, stride: Any, padding: Any, output_padding: Any, dilation: Any
) -> Windows:
    axes = len(size)
    kernel = per_axis("kernel_size", kernel, axes, 1)
    stride = per_axis("stride", stride, axes, 1)
    output_padding = per_axis("output_padding", output_padding, axes, 0)
    dilation = per_axis("dilation", dilation, axes, 1)
    pads = pads_of(padding, size, kernel, stride, dilation)
    check_output_padding(output_padding, stride, dilation)
    back = tuple(
        (n - 1) * s - before - after + d * (k - 1) + extra + 1
        for n, k, s, (before, after), d, extra in zip(
            size, kernel, stride, pads, dilation, output_padding, strict=True
        )
    )
    if 0 in size or min(back) < 1:
        raise ShapeError(
            f"an input {_times(size)} with kernel {_times(kernel)} has the output size "
            f"{_times(back)}; "
            "use less padding or a larger input"
        )
    return _laid(back, kernel, stride, pads, dilation, size)


def _laid(
    size: Numbers, kernel: Numbers, stride: Numbers, pads: Pads, dilation: Numbers, out: Numbers
) -> Windows:
    """Return the windows for checked arguments. A stride longer than the padded input is shortened
    to it: there is one output.
    """
    padded = [n + before + after for n, (before, after) in zip(size, pads, strict=True)]
    if max(prod(size), prod(out), *padded) > _MOST_CELLS:
        raise ArgumentError(
            f"{_times(size)} cells, padded to {_times(padded)}, with {_times(out)} outputs do not "
            "fit in memory; use less padding, or a smaller stride of a transposed convolution"
        )
    stride = tuple(min(s, p) for s, p in zip(stride, padded, strict=True))
    return Windows(size, kernel, stride, pads, dilation, out, tuple(-before for before, _ in pads))


@lru_cache(maxsize=4096)
def _part(windows: Windows, first: int, last: int) -> Windows:
    begin, *others = windows.start
    return replace(
        windows,
        start=(begin + first * windows.stride[0], *others),
        out=(last - first, *windows.out[1:]),
    )


def _is_blind(start: int, out: int, stride: int, kernel: int, dilation: int, size: int) -> bool:
    """Return whether, on one axis, some window contains no input cell. The windows start at start,
    start + stride, ...
    """
    if start + (out - 1) * stride >= size:
        return True
    before = min(out, -(start // stride)) if start < 0 else 0  # windows that start before the input
    # The first cell of such a window that is not before the input must belong to the window and lie
    # inside the input. The pattern of these cells repeats after ``dilation`` windows.
    return (before > 0 and -(start // dilation) >= kernel) or (
        dilation > size
        and any((start + o * stride) % dilation >= size for o in range(min(before, dilation)))
    )


def _axis_tap(offset: int, stride: int, size: int, out: int) -> AxisTap | None:
    """Return, for one axis on which output o reads input ``o*stride + offset``, (the inputs read,
    the outputs that read them).
    """
    first = max(0, -(offset // stride))  # ceil(-offset / stride)
    last = min(out - 1, (size - 1 - offset) // stride)
    if last < first:
        return None
    return (
        slice(first * stride + offset, last * stride + offset + 1, stride),
        slice(first, last + 1),
    )


def _times(numbers: Sequence[int]) -> str:
    return "x".join(str(n) for n in numbers)


# --- gather and scatter ---------------------------------------------------------------------------


@op()
def gather(x: Array, windows: Windows) -> Array:
    """Return the columns (C, T, *OUT, N) of x (C, *S, N): for each output, the inputs under each
    tap; zeros outside the input.
    """
    backend = backend_of(x)
    if not windows.sparse:
        x = backend.contiguous(x)  # read T times, so one copy pays off
    create = backend.xp.empty if windows.covers else backend.xp.zeros
    shape = (x.shape[0], prod(windows.kernel), *windows.out, x.shape[-1])
    columns = create(shape, dtype=x.dtype, device=x.device)
    for tap in windows.taps:
        channels, *reaches = tap.reaches
        columns[(channels, tap.index, *reaches)] = x[tap.reads]
    return columns


gather.on_complex(gather.forward)


@op()
def scatter(columns: Array, windows: Windows) -> Array:
    """Return (C, *S, N) from columns (C, T, *OUT, N): the sum of the entries at each input. The
    adjoint of ``gather``.
    """
    shape = (columns.shape[0], *windows.size, columns.shape[-1])
    x = backend_of(columns).xp.zeros(shape, dtype=columns.dtype, device=columns.device)
    for tap in windows.taps:
        channels, *reaches = tap.reaches
        x[tap.reads] += columns[(channels, tap.index, *reaches)]
    return x


scatter.on_complex(scatter.forward)


# --- for compiled kernels -------------------------------------------------------------------------


class Plane(NamedTuple):
    """The geometry of a convolution over one or two axes as plain integers, for compiled kernels.

    C and O are the channels in and out of one group. With one axis, H, OH and KH are 1.
    """

    c: int
    h: int
    w: int
    o: int
    oh: int
    ow: int
    kh: int
    kw: int
    sh: int
    sw: int
    top: int
    left: int
    dh: int
    dw: int
    n: int

    @staticmethod
    def of(windows: Windows, channels: int, outputs: int, n: int) -> "Plane":
        """Return the plane of ``windows`` with these channels in and out and batch size n."""
        one = (1,) * (2 - len(windows.size))
        (h, w), (oh, ow), (kh, kw) = (
            one + axes for axes in (windows.size, windows.out, windows.kernel)
        )
        (sh, sw), (dh, dw) = one + windows.stride, one + windows.dilation
        top, left = (0,) * len(one) + tuple(before for before, _ in windows.pads)
        return Plane(channels, h, w, outputs, oh, ow, kh, kw, sh, sw, top, left, dh, dw, n)

    def adjoint(self) -> "Plane":
        """Return the convolution that computes dx from dy, with SH-1 and SW-1 zeros between the
        rows and columns of dy.

        Its padding may be negative; then the first rows or columns are not read.
        """
        top, left = self.dh * (self.kh - 1) - self.top, self.dw * (self.kw - 1) - self.left
        return Plane(
            self.o, (self.oh - 1) * self.sh + 1, (self.ow - 1) * self.sw + 1, self.c, self.h,
            self.w,
            self.kh, self.kw, 1, 1, top, left, self.dh, self.dw, self.n,
        )  # fmt: skip
