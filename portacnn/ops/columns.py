"""The columns of sliding windows as matrices: ``unfold`` and ``fold`` over one to three axes, and
the tutorials' ``im2col`` and ``col2im``.

Notation: N batch, C channels, S/OUT the spatial axes in/out, T the taps of the kernel, L the number
of windows (OH*OW in two dimensions). Both pairs are a linear map and its adjoint: each is the
other's backward pass. The arrays may have any dtype, complex ones included.
"""

from collections.abc import Sequence
from math import prod

from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import Padding, Windows, gather, scatter
from portacnn.runtime import Array, backend_of, describe


def _windows(
    name: str,
    shape: Sequence[int],
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
) -> Windows:
    """Return the geometry for an image of ``shape`` (N, C, *S)."""
    if not 3 <= len(shape) <= 5:
        raise ShapeError(
            f"expected images (N, C, *S) with one to three spatial axes, got shape {tuple(shape)}",
            name,
        )
    try:
        return Windows.of(tuple(shape[2:]), kernel_size, stride, padding, dilation)
    except PortacnnError as error:
        raise error.at(name)


def unfold(
    x: Array,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
) -> Array:
    """Return the windows of x as columns, as torch.nn.functional.unfold, over one to three axes.

    The product ``weight.reshape(O, -1) @ unfold(x, K)`` is a convolution, (N, O, L).

    Args:
        x: (N, C, *S), of any dtype; S is W, (H, W) or (D, H, W).
        kernel_size, stride, dilation: an integer, or one per spatial axis.
        padding: zeros around x, as for ``conv2d``.

    Returns:
        (N, C*T, L). Rows are ordered by channel, then by the cells of the kernel; columns as the
        windows lie in the image.

    Raises:
        ShapeError: if x has other than one to three spatial axes, or a window does not fit into it.
        ArgumentError: if kernel_size, stride, padding or dilation is invalid.

    Example:
        >>> ops.unfold(np.arange(4.0).reshape(1, 1, 4), 3, padding=1)[0]
        array([[0., 0., 1., 2.],
               [0., 1., 2., 3.],
               [1., 2., 3., 0.]])
    """
    backend_of(x)
    windows = _windows("unfold", x.shape, kernel_size, stride, padding, dilation)
    columns = gather(batch_last(x), windows)  # (C, T, *OUT, N)
    rows = x.shape[1] * prod(windows.kernel)
    return backend_of(x).xp.reshape(batch_first(columns), (x.shape[0], rows, prod(windows.out)))


def fold(
    columns: Array,
    output_size: int | Sequence[int],
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
) -> Array:
    """Add every entry of the columns to the cell that ``unfold`` reads it from, as
    torch.nn.functional.fold: the adjoint of ``unfold``.

    Args:
        columns: (N, C*T, L), in the order of ``unfold``.
        output_size: S, the spatial size of the images; an integer means one axis.
        kernel_size, stride, padding, dilation: as for ``unfold``.

    Returns:
        (N, C, *S). Overlapping windows add up.

    Raises:
        ShapeError: if the shape of ``columns`` is not that of ``unfold`` for such images.
        ArgumentError: as for ``unfold``.

    Example:
        >>> ops.fold(np.ones((1, 3, 4)), 4, 3, padding=1)[0]
        array([[2., 3., 3., 2.]])
    """
    xp = backend_of(columns).xp
    size = tuple(output_size) if isinstance(output_size, Sequence) else (output_size,)
    n = columns.shape[0] if columns.ndim else 0
    windows = _windows("fold", (n, 1, *size), kernel_size, stride, padding, dilation)
    taps, length = prod(windows.kernel), prod(windows.out)
    if columns.ndim != 3 or columns.shape[1] % taps or columns.shape[2] != length:
        raise ShapeError(
            f"expected columns (N, a multiple of {taps}, {length}) for images of "
            f"{'x'.join(map(str, windows.size))}, got {describe(columns)}",
            "fold",
        )
    columns = xp.reshape(columns, (n, columns.shape[1] // taps, taps, *windows.out))
    return batch_first(scatter(batch_last(columns), windows))


# --- the tutorials' form --------------------------------------------------------------------------


def im2col(input_data: Array, filter_h: int, filter_w: int, stride: int = 1, pad: int = 0) -> Array:
    """Return one row per output pixel with the image patch that it reads: the tutorials' im2col.

    Args:
        input_data: images (N, C, H, W), of any dtype.
        filter_h, filter_w: the kernel size KH, KW.
        stride: an integer, or (vertical, horizontal).
        pad: zeros on every side: an integer, or (vertical, horizontal).

    Returns:
        (N*OH*OW, C*KH*KW). Rows are ordered by image, output row, output column; entries by
        channel, kernel row, kernel column.

    Raises:
        ShapeError: if there are not four axes, or the kernel is larger than the padded image.

    Example:
        >>> ops.im2col(np.arange(9).reshape(1, 1, 3, 3), 2, 2)
        array([[0, 1, 3, 4],
               [1, 2, 4, 5],
               [3, 4, 6, 7],
               [4, 5, 7, 8]])
    """
    xp = backend_of(input_data).xp
    if input_data.ndim != 4:
        raise ShapeError(
            f"expected images (N, C, H, W), got shape {tuple(input_data.shape)}", "im2col"
        )
    n, c, *size = input_data.shape
    windows = Windows.of(size, (filter_h, filter_w), stride, pad)
    columns = gather(batch_last(input_data), windows)  # (C, T, OH, OW, N)
    rows = xp.permute_dims(columns, (4, 2, 3, 0, 1))  # (N, OH, OW, C, T)
    return xp.reshape(rows, (n * prod(windows.out), c * filter_h * filter_w))


def col2im(
    col: Array,
    input_shape: Sequence[int],
    filter_h: int,
    filter_w: int,
    stride: int = 1,
    pad: int = 0,
) -> Array:
    """Add every entry of im2col's rows to the pixel that it was read from: the tutorials' col2im.

    It is the adjoint of im2col, not its inverse: overlapping windows add up.

    Args:
        col: (N*OH*OW, C*KH*KW), in the order of im2col.
        input_shape: (N, C, H, W), the shape of the images.
        filter_h, filter_w, stride, pad: as for im2col.

    Returns:
        (N, C, H, W).

    Raises:
        ShapeError: if the shape of ``col`` is not that of im2col for ``input_shape``.

    Example:
        >>> ops.col2im(np.ones((4, 4)), (1, 1, 3, 3), 2, 2)[0, 0]
        array([[1., 2., 1.],
               [2., 4., 2.],
               [1., 2., 1.]])
    """
    if len(input_shape) != 4:
        raise ShapeError(
            f"expected an input_shape (N, C, H, W), got {tuple(input_shape)}", "col2im"
        )
    xp = backend_of(col).xp
    n, c, *size = input_shape
    windows = Windows.of(size, (filter_h, filter_w), stride, pad)
    expected = (n * prod(windows.out), c * filter_h * filter_w)
    if tuple(col.shape) != expected:
        raise ShapeError(
            f"expected col of shape {expected} for input {tuple(input_shape)}, got "
            f"{tuple(col.shape)}",
            "col2im",
        )
    rows = xp.reshape(col, (n, *windows.out, c, filter_h * filter_w))
    return batch_first(scatter(xp.permute_dims(rows, (3, 4, 1, 2, 0)), windows))
