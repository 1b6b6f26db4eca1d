"""Local response normalization: each value divided by the activity of its neighbours in other
channels, at the same pixel.

    y[c] = x[c] / u[c]**beta
    u[c] = k + alpha/size * (sum of x[j]**2 over the ``size`` channels j around c)

The window of channel c goes from c - size//2 to c + (size-1)//2, cut off at the first and last
channel (the division stays by ``size``).

Notation: N batch, C channels, S the spatial axes. Inside, the channels are the first axis: (C, *S,
N).
"""

from portacnn.arguments import real
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, backend_of, describe


def check_response_norm(size: int, alpha: float, beta: float, k: float) -> None:
    """Raise ArgumentError for numbers that mean nothing."""
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
    """AlexNet's normalization across channels (Krizhevsky et al., 2012), as
    torch.nn.functional.local_response_norm.

    As in PyTorch (and in ONNX, for odd sizes: for even ones its window lies one channel higher)
    alpha is divided by ``size``; the paper's alpha is not.

    Args:
        x: (N, C, *S), floating point.
        size: how many channels a window takes in.
        alpha, beta, k: see the head of this file.
        keep: keep what ``local_response_norm_backward`` needs.

    Returns:
        y, shaped as x, and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: see the message.
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
    """dy (N, C, *S) -> dx. Channel c is in the windows of those that lie from ``after`` before it
    to ``before`` after it:

    dx[c] = dy[c] / u[c]**beta - 2*alpha*beta/size * x[c] * (sum over them of dy[j] * x[j] /
    u[j]**(beta+1))
    """
    xt, u, factor, before, after, scale = saved
    direct = batch_last(dy) * factor
    return batch_first(direct - scale * xt * _window_sum(direct * xt / u, after, before))


def _window_sum(values: Array, before: int, after: int) -> Array:
    """For each channel c of (C, ...) the sum over channels c - before ... c + after, as far as
    there are such."""
    total = backend_of(values).xp.asarray(values, copy=True)
    channels = values.shape[0]
    for step in range(1, min(before, channels - 1) + 1):
        total[step:, ...] += values[: channels - step, ...]
    for step in range(1, min(after, channels - 1) + 1):
        total[: channels - step, ...] += values[step:, ...]
    return total
