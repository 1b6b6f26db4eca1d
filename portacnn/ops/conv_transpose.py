"""Transposed convolution: the input gradient of a convolution, used as a forward pass.

Notation: N batch, C in-channels, O out-channels, G groups, K the kernel and T its taps. S are the
spatial axes of the input, OUT those of the output, usually the larger. Consider the convolution
from OUT to S (``Windows.transposed`` returns its geometry). Each of its outputs reads T inputs;
here each input is added to those T outputs:

    columns (O*T, S*N)  =  weight.T (O*T, C)  @  x (C, S*N);        y = scatter(columns) + bias

This equals the dx of ``conv`` line by line. The gradients are therefore that convolution's forward
pass and its dweight:

    dcolumns = gather(dy);    dx (C, S*N) = weight @ dcolumns;    dweight (C, O*T) = x @ dcolumns.T

A convolution and its transpose share a weight, so the weight has the shape (C, O/G, *K) here.
"""

from collections.abc import Sequence
from math import prod

from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.complex_parts import product_by_product
from portacnn.ops.conv import blocks, check_bias
from portacnn.ops.dispatch import Cache, op
from portacnn.ops.faces import check_input, faces
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import AXES, Padding, Windows, gather, per_axis, scatter
from portacnn.runtime import Array, backend_of, describe


@op()
def conv_transpose(
    x: Array, weight: Array, bias: Array | None, windows: Windows, groups: int, *, keep: bool
) -> tuple[Array, tuple | None]:
    """Convolve x (N, C, *S) with weight (C, O/G, *K), transposed, and add bias (O,) -> y (N, O,
    *OUT). ``windows`` is the geometry from OUT to S.
    """
    backend = backend_of(x)
    xp = backend.xp
    c, width, length = _sizes(x, weight, windows)
    xt = blocks(backend.contiguous(batch_last(x)), groups, c // groups, length)
    columns = xp.matmul(xp.matrix_transpose(blocks(weight, groups, c // groups, width)), xt)
    columns = xp.reshape(
        columns, (weight.shape[1] * groups, prod(windows.kernel), *windows.out, x.shape[0])
    )
    y = scatter(columns, windows)
    if bias is not None:
        y += xp.reshape(bias, bias.shape + (1,) * (y.ndim - 1))
    return batch_first(y), (x, weight, bias is not None, windows, groups) if keep else None


@conv_transpose.backward
def conv_transpose_backward(
    dy: Array,
    saved: tuple,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of a transposed convolution: dx (N, C, *S), dweight (C, O/G, *K), dbias
    (O,).

    dy: (N, O, *OUT). Each is None if its ``need`` is False; dbias also if there was no bias.
    """
    x, weight, with_bias, windows, groups = saved
    backend = backend_of(x)
    xp = backend.xp
    c, width, length = _sizes(x, weight, windows)
    dyt = backend.contiguous(batch_last(dy))
    dbias = dweight = None
    if with_bias and need_dbias:
        dbias = xp.sum(xp.reshape(dyt, (dyt.shape[0], prod(dyt.shape[1:]))), axis=-1)
    if not (need_dx or need_dweight):
        return None, None, dbias
    dcolumns = blocks(gather(dyt, windows), groups, width, length)
    if need_dweight:
        xt = blocks(backend.contiguous(batch_last(x)), groups, c // groups, length)
        dweight = xp.reshape(xp.matmul(xt, xp.matrix_transpose(dcolumns)), weight.shape)
    if not need_dx:
        return None, dweight, dbias
    dx = xp.matmul(blocks(weight, groups, c // groups, width), dcolumns)
    return batch_first(xp.reshape(dx, (c, *windows.out, x.shape[0]))), dweight, dbias


product_by_product(conv_transpose, conv_transpose_backward, transposed=True)


def _sizes(x: Array, weight: Array, windows: Windows) -> tuple[int, int, int]:
    """Return the three extents of the products: C; O/G*T; S*N."""
    return weight.shape[0], prod(weight.shape[1:]), prod(windows.out) * x.shape[0]


# --- the public functions -------------------------------------------------------------------------


def _conv_transpose(
    axes: int,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Convolve with a transposed kernel, as torch.nn.functional.conv_transpose1d, 2d and 3d.

    Args:
        x: (N, C, *S), floating point or complex; S is W, (H, W) or (D, H, W).
        weight: (C, O/groups, *K), of x's dtype and device.
        bias: (O,), or None.
        stride, dilation: an integer, or one per spatial axis.
        padding: the padding of the convolution from OUT to S; that many cells are removed from the
            output. An integer, one per axis, or a pair (before, after) per axis.
        output_padding: cells to add at the end of the output, because with a stride several output
            sizes belong to one input size. An integer or one per axis, below the stride or the
            dilation.
        groups: the number of channel blocks that are convolved separately; it must divide C and O.
        keep: store what the backward function needs.

    Returns:
        y (N, O, *OUT) with OUT = (S-1)*stride - before - after + dilation*(K-1) + output_padding +
        1, and the cache.

    Raises:
        ShapeError: if ranks or channel counts do not match the input, or the padding leaves no
            output.
        ArgumentError: if stride, padding, output_padding, dilation or groups is invalid.
        ArrayError: if the arrays are integers, or differ in library, device or dtype.

    Example:
        >>> x = np.array([[[[1.0, 2.0]]]])
        >>> y, cache = ops.conv_transpose2d(x, np.ones((1, 1, 1, 2)), stride=2)
        >>> y[0, 0]
        array([[1., 1., 2., 2.]])
        >>> dx, dweight, dbias = ops.conv_transpose2d_backward(np.ones_like(y), cache)
        >>> dx[0, 0]
        array([[2., 2.]])
    """
    name = f"conv_transpose{axes}d"
    check_input(name, axes, x, linear=True, weight=weight, bias=bias)
    try:
        per_axis("groups", groups, 1, 1)
        if weight.ndim != axes + 2:
            raise ShapeError(
                f"expected a weight (C, O/groups, {AXES[axes]}), got shape {tuple(weight.shape)}"
            )
        channels = weight.shape[0]
        if x.shape[1] != channels:
            raise ShapeError(
                f"expected {channels} input channels, got {x.shape[1]} (input {describe(x)})"
            )
        if channels % groups:
            raise ShapeError(f"{channels} input channels do not split into {groups} groups")
        check_bias(bias, weight.shape[1] * groups)
        windows = Windows.transposed(
            x.shape[2:], weight.shape[2:], stride, padding, output_padding, dilation
        )
    except PortacnnError as error:
        raise error.at(name)
    return conv_transpose(x, weight, bias, windows, groups, keep=keep)


conv_transpose1d, conv_transpose2d, conv_transpose3d = faces("conv_transpose", _conv_transpose)
conv_transpose1d_backward = conv_transpose2d_backward = conv_transpose3d_backward = (
    conv_transpose_backward
)
