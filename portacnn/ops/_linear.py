"""The affine map of a fully connected layer.

Notation: N batch, F in-features, O out-features. When the batch is the last axis in memory, x.T (F,
N) and y.T (O, N) are contiguous, so the product is computed as y.T = weight @ x.T + bias.
"""

from portacnn.errors import ShapeError
from portacnn.ops.complex_parts import conj
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of, describe


def check_linear(
    name: str, x: Array, weight: Array, bias: Array | None, linear: bool = False
) -> None:
    """Check the arguments of the affine map called ``name``. Raises the errors of ``linear``.
    ``linear`` allows complex arrays.
    """
    check_arrays(name, linear=linear, x=x, weight=weight, bias=bias)
    if x.ndim != 2 or weight.ndim != 2:
        raise ShapeError(
            f"expected an input (N, F) and a weight (O, F), got {describe(x)} and "
            f"{describe(weight)}",
            name,
        )
    if x.shape[1] != weight.shape[1]:
        raise ShapeError(
            f"expected {weight.shape[1]} input features, got {x.shape[1]} (input {describe(x)})",
            name,
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(
            f"expected a bias of shape ({weight.shape[0]},), got {tuple(bias.shape)}", name
        )


def _check(x: Array, weight: Array, bias: Array | None = None, *, keep: bool = True) -> None:
    check_linear("linear", x, weight, bias, linear=True)


@op(_check)
def linear(
    x: Array, weight: Array, bias: Array | None = None, *, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Compute y = x @ weight.T + bias, as torch.nn.functional.linear.

    Args:
        x: (N, F), floating point or complex.
        weight: (O, F), of x's dtype and device.
        bias: (O,), or None.
        keep: store what ``linear_backward`` needs.

    Returns:
        y (N, O) and the cache.

    Raises:
        ShapeError: if the shapes do not match.
        ArrayError: if the arrays are integers, or differ in library, device or dtype.

    Example:
        >>> x, weight = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> y, cache = ops.linear(x, weight, np.array([0.0, 0.0, 10.0]))
        >>> y
        array([[ 1.,  2., 13.]])
        >>> dx, dweight, dbias = ops.linear_backward(np.ones((1, 3)), cache)
        >>> dx
        array([[2., 2.]])
    """
    yt = weight @ x.T
    if bias is not None:
        yt += bias[:, None]
    return yt.T, (x, weight, bias is not None) if keep else None


@linear.backward
def linear_backward(
    dy: Array,
    saved: tuple,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of ``linear``: dx (N, F), dweight (O, F) and dbias (O,) for dy (N, O).

    Each is None if its ``need`` is False; dbias also if there was no bias.
    """
    x, weight, with_bias = saved
    dx = (weight.T @ dy.T).T if need_dx else None
    dweight = dy.T @ x if need_dweight else None
    dbias = backend_of(dy).xp.sum(dy, axis=0) if with_bias and need_dbias else None
    return dx, dweight, dbias


def _complex_backward(
    dy: Array, saved: tuple, **needs: bool
) -> tuple[Array | None, Array | None, Array | None]:
    x, weight, with_bias = saved
    assert linear.portable_backward is not None
    return linear.portable_backward(dy, (conj(x), conj(weight), with_bias), **needs)


linear.on_complex(linear.forward, _complex_backward)
