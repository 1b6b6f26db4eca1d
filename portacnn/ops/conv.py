"""Convolution, as the matrix product of the weights with the columns that ``windows.gather`` lays out.

Notation: N batch, C in-channels, O out-channels, G groups, S/OUT the spatial axes in/out (H, W/OH, OW), K the kernel
(KH, KW) and T its taps (KH*KW). Activations lie (C, *S, N) in memory, so a product's result is in place as it comes:

    y (O, OUT*N)  =  weight (O, C*T)  @  columns (C*T, OUT*N)

Both gradients are products with the same columns, and the gradient of the columns goes back to where they were read:

    dweight (O, C*T)       =  dy (O, OUT*N)   @  columns.T
    dcolumns (C*T, OUT*N)  =  weight.T        @  dy;         dx = scatter(dcolumns)

With groups, the channels of each factor split into G blocks, and the products run block by block. What this field calls
convolution is cross-correlation: the kernel is not flipped.
"""

from collections.abc import Sequence
from math import prod

from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.dispatch import Cache, check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import AXES, Padding, Windows, gather, per_axis, scatter
from portacnn.runtime import Array, backend_of, describe


@op()
def conv(
    x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int, *, keep: bool
) -> tuple[Array, tuple | None]:
    """x (N, C, *S), weight (O, C/G, *K), bias (O,) -> y (N, O, *OUT). The op behind conv1d, conv2d and conv3d."""
    xp = backend_of(x).xp
    o, depth, length = _sizes(x, weight, windows)
    columns = _blocks(gather(batch_last(x), windows), groups, depth, length)
    y = xp.matmul(_blocks(weight, groups, o // groups, depth), columns)
    y = xp.reshape(y, (o, *windows.out, x.shape[0]))
    if bias is not None:
        y += xp.reshape(bias, (o,) + (1,) * (y.ndim - 1))
    # The columns are T times the input: they are laid out again for the backward rather than held until then.
    return batch_first(y), (x, weight, bias is not None, windows, groups) if keep else None


@conv.backward
def conv_backward(dy: Array, saved: tuple, *, need_dx: bool = True) -> tuple[Array | None, Array, Array | None]:
    """dy (N, O, *OUT) -> dx (N, C, *S) or None, dweight (O, C/G, *K), dbias (O,) or None."""
    x, weight, with_bias, windows, groups = saved
    xp = backend_of(x).xp
    o, depth, length = _sizes(x, weight, windows)
    dy = _blocks(backend_of(x).contiguous(batch_last(dy)), groups, o // groups, length)
    dbias = xp.reshape(xp.sum(dy, axis=-1), (o,)) if with_bias else None
    columns = _blocks(gather(batch_last(x), windows), groups, depth, length)
    dweight = xp.reshape(xp.matmul(dy, xp.matrix_transpose(columns)), weight.shape)
    if not need_dx:
        return None, dweight, dbias
    weight = _blocks(weight, groups, o // groups, depth)
    dcolumns = xp.matmul(xp.matrix_transpose(weight), dy)
    dcolumns = xp.reshape(dcolumns, (x.shape[1], prod(windows.kernel), *windows.out, x.shape[0]))
    return batch_first(scatter(dcolumns, windows)), dweight, dbias


def _sizes(x: Array, weight: Array, windows: Windows) -> tuple[int, int, int]:
    """The three extents of the products: O; C/G*T; OUT*N."""
    return weight.shape[0], prod(weight.shape[1:]), prod(windows.out) * x.shape[0]


def _blocks(array: Array, groups: int, rows: int, columns: int) -> Array:
    """As G matrices, (G, rows, columns); as one plain matrix where there is one group (libraries are best at those)."""
    return backend_of(array).xp.reshape(array, (rows, columns) if groups == 1 else (groups, rows, columns))


# --- the public faces -----------------------------------------------------------------------------------------------


def _convolve(
    axes: int,
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    keep: bool,
) -> tuple[Array, Cache | None]:
    name = f"conv{axes}d"
    check_arrays(name, x=x, weight=weight, bias=bias)
    windows = conv_windows(name, axes, x, tuple(weight.shape), stride, padding, dilation, groups)
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ShapeError(f"expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}", name)
    return conv(x, weight, bias, windows, groups, keep=keep)


def conv_windows(
    name: str,
    axes: int,
    x: Array,
    weight_shape: tuple[int, ...],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
) -> Windows:
    """Check input and weight against each other and give the geometry. Raises ShapeError or ArgumentError."""
    if x.ndim != axes + 2:
        raise ShapeError(f"expected an input (N, C, {AXES[axes]}), got {x.ndim} axes (input {describe(x)})", name)
    if len(weight_shape) != axes + 2:
        raise ShapeError(f"expected a weight (O, C/groups, {AXES[axes]}), got shape {weight_shape}", name)
    try:
        per_axis("groups", groups, 1, 1)
    except PortacnnError as error:
        raise error.at(name)
    channels = weight_shape[1] * groups
    if x.shape[1] != channels:
        raise ShapeError(f"expected {channels} input channels, got {x.shape[1]} (input {describe(x)})", name)
    if weight_shape[0] % groups:
        raise ShapeError(f"{weight_shape[0]} output channels do not split into {groups} groups", name)
    try:
        return Windows.of(x.shape[2:], weight_shape[2:], stride, padding, dilation)
    except PortacnnError as error:
        raise error.at(name)


def conv2d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Two-dimensional convolution (cross-correlation), as torch.nn.functional.conv2d.

    Args:
        x: (N, C, H, W), floating point.
        weight: (O, C/groups, KH, KW), of x's dtype and device.
        bias: (O,), or None.
        stride, dilation: a number, or (vertical, horizontal).
        padding: zeros around the input: a number, (vertical, horizontal), ((top, bottom), (left, right)), ``"valid"``
            or ``"same"`` (OH = ceil(H / stride), the odd row or column at the end).
        groups: blocks of channels that do not see each other; C and O must be multiples of it.
        keep: keep what ``conv2d_backward`` needs.

    Returns:
        y (N, O, OH, OW) with OH = (H + top + bottom - dilation*(KH-1) - 1) // stride + 1, and the cache.

    Raises:
        ShapeError: ranks, channel counts or a kernel that do not fit the input.
        ArgumentError: a stride, padding, dilation or group count without a meaning.
        ArrayError: integers, or arrays of mixed libraries, devices or dtypes.
    """
    return _convolve(2, x, weight, bias, stride, padding, dilation, groups, keep)


def conv2d_backward(
    dy: Array, cache: Cache | None, *, need_dx: bool = True
) -> tuple[Array | None, Array, Array | None]:
    """The gradients (dx, dweight, dbias) of ``conv2d`` for dy (N, O, OH, OW); dx is None without ``need_dx``."""
    return conv_backward(dy, cache, need_dx=need_dx)
