"""Transposed convolution: what a convolution's gradient does to dy, used as a layer of its own. It
undoes its strides.

Notation: N batch, C in-channels, O out-channels, G groups, K the kernel and T its taps. S are the
spatial axes of the input, OUT those of the output; OUT is the larger one. Take the convolution that
leads from OUT back to S (its geometry is ``Windows.transposed``). There every output reads T
inputs; here every input writes to those T outputs:

    columns (O*T, S*N)  =  weight.T (O*T, C)  @  x (C, S*N);        y = scatter(columns) + bias

This is line for line the dx of ``conv``, and so the gradients are that convolution's forward and
its dweight:

    dcolumns = gather(dy);    dx (C, S*N) = weight @ dcolumns;    dweight (C, O*T) = x @ dcolumns.T

That a convolution and its transpose share a weight is why the weight lies (C, O/G, *K) here: it is
the convolution's own.
"""

from collections.abc import Sequence
from math import prod

from portacnn.errors import PortacnnError, ShapeError
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
    """x (N, C, *S), weight (C, O/G, *K), bias (O,) -> y (N, O, *OUT); ``windows`` lead from OUT to
    S."""
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
    dy: Array, saved: tuple, *, need_dx: bool = True
) -> tuple[Array | None, Array, Array | None]:
    """The gradients of a transposed convolution: dy (N, O, *OUT) -> dx (N, C, *S), dweight (C, O/G,
    *K), dbias (O,).

    dx is None without ``need_dx``, dbias where there was no bias.
    """
    x, weight, with_bias, windows, groups = saved
    backend = backend_of(x)
    xp = backend.xp
    c, width, length = _sizes(x, weight, windows)
    dyt = backend.contiguous(batch_last(dy))
    dbias = (
        xp.sum(xp.reshape(dyt, (dyt.shape[0], prod(dyt.shape[1:]))), axis=-1) if with_bias else None
    )
    dcolumns = blocks(gather(dyt, windows), groups, width, length)
    xt = blocks(backend.contiguous(batch_last(x)), groups, c // groups, length)
    dweight = xp.reshape(xp.matmul(xt, xp.matrix_transpose(dcolumns)), weight.shape)
    if not need_dx:
        return None, dweight, dbias
    dx = xp.matmul(blocks(weight, groups, c // groups, width), dcolumns)
    return batch_first(xp.reshape(dx, (c, *windows.out, x.shape[0]))), dweight, dbias


def _sizes(x: Array, weight: Array, windows: Windows) -> tuple[int, int, int]:
    """The three extents of the products: C; O/G*T; S*N."""
    return weight.shape[0], prod(weight.shape[1:]), prod(windows.out) * x.shape[0]


# --- the public faces -----------------------------------------------------------------------------


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
    """Transposed convolution, as torch.nn.functional.conv_transpose1d, conv_transpose2d and
    conv_transpose3d.

    Args:
        x: (N, C, *S), floating point; S is W, (H, W) or (D, H, W).
        weight: (C, O/groups, *K), of x's dtype and device.
        bias: (O,), or None.
        stride, dilation: a number, or one for each spatial axis.
        padding: the padding of the convolution that leads back, so much is cut off from the output:
            a number, one for each axis, or a pair (before, after) for each axis.
        output_padding: cells more at the end of the output, where a stride leaves its size open; a
            number or one for each axis, below the stride or the dilation.
        groups: blocks of channels that do not see each other; C and O must be multiples of it.
        keep: keep what the backward needs.

    Returns:
        y (N, O, *OUT) with OUT = (S-1)*stride - before - after + dilation*(K-1) + output_padding +
        1, and the cache.

    Raises:
        ShapeError: ranks or channel counts that do not fit the input; a padding that leaves
            nothing.
        ArgumentError: a stride, padding, output_padding, dilation or group count without a meaning.
        ArrayError: integers, or arrays of mixed libraries, devices or dtypes.
    """
    name = f"conv_transpose{axes}d"
    check_input(name, axes, x, weight=weight, bias=bias)
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
