"""Pixel shuffle: channels become pixels, r by r of them, and back (Shi et al., 2016, "Real-time
single image and video super-resolution using an efficient sub-pixel convolutional neural network").

Notation: N batch, C channels, H/W input, r the factor. Nothing is computed: pixel (h*r + i,
w*r + j) of channel c is pixel (h, w) of channel c*r*r + i*r + j. So each of the two is the other's
backward.
"""

from portacnn.arguments import whole
from portacnn.errors import PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.runtime import Array, backend_of, describe


def check_shuffle(shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
    """The shape (C, H*r, W*r) of a sample (C*r*r, H, W). Raises ShapeError, ArgumentError."""
    whole("upscale_factor", factor, 1)
    if len(shape) != 3 or shape[0] % factor**2:
        raise ShapeError(
            f"expected samples (C*{factor**2}, H, W) for a factor of {factor}, got {shape}"
        )
    return shape[0] // factor**2, shape[1] * factor, shape[2] * factor


def check_unshuffle(shape: tuple[int, ...], factor: int) -> tuple[int, ...]:
    """The shape (C*r*r, H, W) of a sample (C, H*r, W*r). Raises ShapeError, ArgumentError."""
    whole("downscale_factor", factor, 1)
    if len(shape) != 3 or shape[1] % factor or shape[2] % factor:
        raise ShapeError(
            f"expected samples (C, H, W) with H and W multiples of {factor}, got {shape}"
        )
    return shape[0] * factor**2, shape[1] // factor, shape[2] // factor


def _check_shuffle(x: Array, upscale_factor: int, *, keep: bool = True) -> None:
    _check("pixel_shuffle", check_shuffle, x, upscale_factor)


def _check_unshuffle(x: Array, downscale_factor: int, *, keep: bool = True) -> None:
    _check("pixel_unshuffle", check_unshuffle, x, downscale_factor)


def _check(name: str, check: object, x: Array, factor: int) -> None:
    check_arrays(name, x=x)
    if x.ndim != 4:
        raise ShapeError(f"expected an input (N, C, H, W), got {describe(x)}", name)
    try:
        check(tuple(x.shape[1:]), factor)  # type: ignore[operator]
    except PortacnnError as error:
        raise error.at(name)


@op(_check_shuffle)
def pixel_shuffle(
    x: Array, upscale_factor: int, *, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Move channels to pixels, as torch.nn.functional.pixel_shuffle does: x (N, C*r*r, H, W) -> y
    (N, C, H*r, W*r).

        >>> import numpy as np
        >>> from portacnn import ops
        >>> y, cache = ops.pixel_shuffle(np.arange(4.0).reshape(1, 4, 1, 1), 2)
        >>> y.tolist()
        [[[[0.0, 1.0], [2.0, 3.0]]]]
        >>> ops.pixel_shuffle_backward(y, cache).shape
        (1, 4, 1, 1)

    Args:
        x: floating point.
        upscale_factor: r.
        keep: keep what ``pixel_shuffle_backward`` needs.

    Returns:
        y and the cache.

    Raises:
        ShapeError, ArgumentError, ArrayError: see the message.
    """
    return _shuffled(x, upscale_factor), (upscale_factor,) if keep else None


@pixel_shuffle.backward
def pixel_shuffle_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient of ``pixel_shuffle``: dy (N, C, H*r, W*r) -> dx (N, C*r*r, H, W)."""
    return _unshuffled(dy, *saved)


@op(_check_unshuffle)
def pixel_unshuffle(
    x: Array, downscale_factor: int, *, keep: bool = True
) -> tuple[Array, tuple | None]:
    """Move pixels to channels, as torch.nn.functional.pixel_unshuffle does: x (N, C, H*r, W*r) ->
    y (N, C*r*r, H, W).

        >>> import numpy as np
        >>> from portacnn import ops
        >>> y, cache = ops.pixel_unshuffle(np.arange(4.0).reshape(1, 1, 2, 2), 2)
        >>> y.reshape(-1).tolist()
        [0.0, 1.0, 2.0, 3.0]
        >>> ops.pixel_unshuffle_backward(y, cache).shape
        (1, 1, 2, 2)

    Arguments, results and errors as for ``pixel_shuffle``.
    """
    return _unshuffled(x, downscale_factor), (downscale_factor,) if keep else None


@pixel_unshuffle.backward
def pixel_unshuffle_backward(dy: Array, saved: tuple) -> Array:
    """Return the gradient of ``pixel_unshuffle``: dy (N, C*r*r, H, W) -> dx (N, C, H*r, W*r)."""
    return _shuffled(dy, *saved)


def _shuffled(x: Array, r: int) -> Array:
    backend = backend_of(x)
    xp = backend.xp
    if backend.layout == "batch_first":
        n, c, h, w = x.shape
        y = xp.reshape(x, (n, c // r**2, r, r, h, w))
        return xp.reshape(xp.permute_dims(y, (0, 1, 4, 2, 5, 3)), (n, c // r**2, h * r, w * r))
    c, h, w, n = batch_last(x).shape
    y = xp.reshape(batch_last(x), (c // r**2, r, r, h, w, n))
    y = xp.permute_dims(y, (0, 3, 1, 4, 2, 5))
    return batch_first(xp.reshape(y, (c // r**2, h * r, w * r, n)))


def _unshuffled(x: Array, r: int) -> Array:
    backend = backend_of(x)
    xp = backend.xp
    if backend.layout == "batch_first":
        n, c, h, w = x.shape
        y = xp.reshape(x, (n, c, h // r, r, w // r, r))
        return xp.reshape(xp.permute_dims(y, (0, 1, 3, 5, 2, 4)), (n, c * r**2, h // r, w // r))
    c, h, w, n = batch_last(x).shape
    y = xp.reshape(batch_last(x), (c, h // r, r, w // r, r, n))
    y = xp.permute_dims(y, (0, 2, 4, 1, 3, 5))
    return batch_first(xp.reshape(y, (c * r**2, h // r, w // r, n)))
