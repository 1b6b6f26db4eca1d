"""Local response normalization: each value is divided by a function of the values at the same pixel
in neighbouring channels.

    y[c] = x[c] / u[c]**beta
    u[c] = k + alpha/size * (sum of x[j]**2 over the ``size`` channels j around c)

The window of channel c spans c - size//2 to c + (size-1)//2 and is cut off at the first and last
channel. The divisor stays ``size``.

Notation: N batch, C channels, S the spatial axes. Internally the channels are the first axis: (C,
*S, N).
"""

from portacnn.arguments import real
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, backend_of, describe


def check_response_norm(size: int, alpha: float, beta: float, k: float) -> None:
    """Raise ArgumentError if size is not a positive integer, or alpha, beta or k is not a finite
    number.
    """
    per_axis("size", size, 1, 1)
    for name, value in (("alpha", alpha), ("beta", beta), ("k", k)):
        real(name, value)


def _check(
    x: Array,
    size: int,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    keep: bool = True,
) -> None:
    name = "local_response_norm"
    check_arrays(name, x=x)
    if x.ndim < 3:
        raise ShapeError(
            f"expected an input (N, C, *S) of at least 3 axes, got {describe(x)}", name
        )
    try:
        check_response_norm(size, alpha, beta, k)
    except PortacnnError as error:
        raise error.at(name)


@op(_check)
def local_response_norm(
    x: Array,
    size: int,
    *,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Normalize across channels as AlexNet does, as torch.nn.functional.local_response_norm.

    Krizhevsky et al., 2012. alpha is divided by ``size`` as in PyTorch and ONNX; in the paper it is
    not. For an even size, ONNX's window starts one channel higher.

    Args:
        x: (N, C, *S), floating point.
        size: the number of channels in a window.
        alpha, beta, k: see the head of this file.
        keep: store what ``local_response_norm_backward`` needs.

    Returns:
        y, with the shape of x, and the cache.

    Raises:
        ShapeError: if x has fewer than 3 axes.
        ArgumentError: if size, alpha, beta or k is invalid.
        ArrayError: if x is not floating point.

    Example:
        >>> x = np.array([[[1.0], [2.0], [3.0]]])
        >>> y, cache = ops.local_response_norm(x, 3, alpha=3.0, beta=1.0)
        >>> np.round(y[0, :, 0], 4)
        array([0.1667, 0.1333, 0.2143])
        >>> dx = ops.local_response_norm_backward(np.ones_like(y), cache)
    """
    xt = batch_last(x)
    before, after = size // 2, (size - 1) // 2
    u = k + alpha / size * _window_sum(xt * xt, before, after)
    factor = u**-beta
    return batch_first(xt * factor), (
        xt,
        u,
        factor,
        before,
        after,
        2.0 * alpha * beta / size,
    ) if keep else None


@local_response_norm.backward
def local_response_norm_backward(dy: Array, saved: tuple) -> Array:
    """Return dx (N, C, *S) for dy of that shape.

    Channel c is in the windows of the channels j from c - ``after`` to c + ``before``:

    dx[c] = dy[c] / u[c]**beta - 2*alpha*beta/size * x[c] * (sum over j of dy[j] * x[j] /
    u[j]**(beta+1))
    """
    xt, u, factor, before, after, scale = saved
    direct = batch_last(dy) * factor
    return batch_first(direct - scale * xt * _window_sum(direct * xt / u, after, before))


def _window_sum(values: Array, before: int, after: int) -> Array:
    """Return for each channel c of (C, ...) the sum over the existing channels c - before ... c +
    after.
    """
    total = backend_of(values).xp.asarray(values, copy=True)
    channels = values.shape[0]
    for step in range(1, min(before, channels - 1) + 1):
        total[step:, ...] += values[: channels - step, ...]
    for step in range(1, min(after, channels - 1) + 1):
        total[: channels - step, ...] += values[step:, ...]
    return total
