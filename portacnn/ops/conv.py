"""Convolution as a matrix product of the weights and the columns that ``windows.gather`` builds.

Notation: N batch, C in-channels, O out-channels, G groups, S/OUT the spatial axes in/out (H, W/OH,
OW), K the kernel (KH, KW) and T its taps (KH*KW). Activations lie (C, *S, N) in memory, so the
result of the product needs no transpose:

    y (O, OUT*N)  =  weight (O, C*T)  @  columns (C*T, OUT*N)

Both gradients are products with the same columns. The gradient of the columns is added to the
inputs that they were read from:

    dweight (O, C*T)       =  dy (O, OUT*N)   @  columns.T
    dcolumns (C*T, OUT*N)  =  weight.T        @  dy;         dx = scatter(dcolumns)

With groups, the channels of each factor are split into G blocks, and there is one product per
block. As everywhere in this field, convolution means cross-correlation: the kernel is not flipped.
"""

from collections.abc import Sequence
from math import prod

from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.complex_parts import product_by_product
from portacnn.ops.dispatch import Cache, op
from portacnn.ops.faces import check_input, faces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import AXES, Padding, Windows, gather, per_axis, scatter
from portacnn.runtime import Array, backend_of, describe


@op()
def conv(
    x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int, *, keep: bool
) -> tuple[Array, tuple | None]:
    """Convolve x (N, C, *S) with weight (O, C/G, *K) and add bias (O,) -> y (N, O, *OUT). The op
    behind conv1d, conv2d and conv3d.
    """
    xp = backend_of(x).xp
    o, depth, length = _sizes(x, weight, windows)
    columns = blocks(gather(batch_last(x), windows), groups, depth, length)
    y = xp.matmul(blocks(weight, groups, o // groups, depth), columns)
    y = xp.reshape(y, (o, *windows.out, x.shape[0]))
    if bias is not None:
        y += xp.reshape(bias, (o,) + (1,) * (y.ndim - 1))
    # The columns are T times the size of the input, so the backward pass builds them again instead
    # of storing them.
    return batch_first(y), (x, weight, bias is not None, windows, groups) if keep else None


@conv.backward
def conv_backward(
    dy: Array,
    saved: tuple,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of a convolution: dx (N, C, *S), dweight (O, C/G, *K), dbias (O,).

    dy: (N, O, *OUT). Each is None if its ``need`` is False; dbias also if there was no bias.
    """
    x, weight, with_bias, windows, groups = saved
    xp = backend_of(x).xp
    o, depth, length = _sizes(x, weight, windows)
    dy = blocks(backend_of(x).contiguous(batch_last(dy)), groups, o // groups, length)
    dbias = xp.reshape(xp.sum(dy, axis=-1), (o,)) if with_bias and need_dbias else None
    dweight = None
    if need_dweight:
        columns = blocks(gather(batch_last(x), windows), groups, depth, length)
        dweight = xp.reshape(xp.matmul(dy, xp.matrix_transpose(columns)), weight.shape)
    if not need_dx:
        return None, dweight, dbias
    weight = blocks(weight, groups, o // groups, depth)
    dcolumns = xp.matmul(xp.matrix_transpose(weight), dy)
    dcolumns = xp.reshape(dcolumns, (x.shape[1], prod(windows.kernel), *windows.out, x.shape[0]))
    return batch_first(scatter(dcolumns, windows)), dweight, dbias


product_by_product(conv, conv_backward)


def check_bias(bias: Array | None, channels: int) -> None:
    """Raise ShapeError if there is a bias and its shape is not (channels,)."""
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ShapeError(f"expected a bias of shape ({channels},), got {tuple(bias.shape)}")


def _sizes(x: Array, weight: Array, windows: Windows) -> tuple[int, int, int]:
    """Return the three extents of the products: O; C/G*T; OUT*N."""
    return weight.shape[0], prod(weight.shape[1:]), prod(windows.out) * x.shape[0]


def blocks(array: Array, groups: int, rows: int, columns: int) -> Array:
    """Reshape to G matrices (G, rows, columns). One group becomes a plain matrix, for which
    libraries are fastest.
    """
    return backend_of(array).xp.reshape(
        array, (rows, columns) if groups == 1 else (groups, rows, columns)
    )


# --- the public functions -------------------------------------------------------------------------


def conv_windows(
    axes: int,
    x: Array,
    weight: Array,
    bias: Array | None,
    *,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
) -> Windows:
    """Check the arguments of ``conv1d``, ``conv2d`` or ``conv3d`` and return the geometry. Raises
    their errors.
    """
    name = f"conv{axes}d"
    check_input(name, axes, x, linear=True, weight=weight, bias=bias)
    try:
        per_axis("groups", groups, 1, 1)
        if weight.ndim != axes + 2:
            raise ShapeError(
                f"expected a weight (O, C/groups, {AXES[axes]}), got shape {tuple(weight.shape)}"
            )
        o, channels = weight.shape[0], weight.shape[1] * groups
        if x.shape[1] != channels:
            raise ShapeError(
                f"expected {channels} input channels, got {x.shape[1]} (input {describe(x)})"
            )
        if o % groups:
            raise ShapeError(f"{o} output channels do not split into {groups} groups")
        check_bias(bias, o)
        return Windows.of(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    except PortacnnError as error:
        raise error.at(name)


def _conv(
    axes: int,
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
    """Convolve (cross-correlate) x with weight, as torch.nn.functional.conv1d, conv2d and conv3d.

    Args:
        x: (N, C, *S), floating point or complex; S is W, (H, W) or (D, H, W).
        weight: (O, C/groups, *K), of x's dtype and device.
        bias: (O,), or None.
        stride, dilation: an integer, or one per spatial axis.
        padding: zeros around the input: an integer, one per axis, a pair (before, after) per axis,
            ``"valid"``, or ``"same"`` (OUT = ceil(S / stride); an odd cell goes to the end).
        groups: the number of channel blocks that are convolved separately; it must divide C and O.
        keep: store what the backward function needs.

    Returns:
        y (N, O, *OUT) with OUT = (S + before + after - dilation*(K-1) - 1) // stride + 1, and the
        cache.

    Raises:
        ShapeError: if ranks, channel counts or the kernel do not match the input.
        ArgumentError: if stride, padding, dilation or groups is invalid.
        ArrayError: if the arrays are integers, or differ in library, device or dtype.

    Example:
        >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
        >>> y, cache = ops.conv2d(x, np.ones((1, 1, 2, 2)), stride=1)
        >>> y[0, 0]
        array([[ 8., 12.],
               [20., 24.]])
        >>> dx, dweight, dbias = ops.conv2d_backward(np.ones_like(y), cache)
        >>> dx[0, 0]
        array([[1., 2., 1.],
               [2., 4., 2.],
               [1., 2., 1.]])
    """
    windows = conv_windows(
        axes, x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return conv(x, weight, bias, windows, groups, keep=keep)


conv1d, conv2d, conv3d = faces("conv", _conv)
conv1d_backward = conv2d_backward = conv3d_backward = conv_backward
