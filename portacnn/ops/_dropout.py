"""Dropout: the public functions. ``masks`` defines how a mask is computed.

Notation: N batch, C channels, L the length of one channel, H/W and D/H/W its spatial axes.
"""

from functools import lru_cache
from math import prod
from typing import Any

from portacnn.arguments import LARGEST, as_int, real
from portacnn.errors import ArgumentError, ArrayError, PortacnnError, ShapeError
from portacnn.ops.dispatch import Cache, check_arrays
from portacnn.ops.masks import drop, drop_backward
from portacnn.runtime import Array, backend_of, describe
from portacnn.seeds import words

_key = lru_cache(maxsize=4096)(words)


def _dropout(
    name: str,
    x: Array,
    p: float,
    training: bool,
    per_channel: int | None,
    seed: int,
    path: str,
    step: Any,
    first: Any,
    keep: bool,
) -> tuple[Array, Cache | None]:
    """Check the arguments and apply dropout. ``per_channel`` is the number of spatial axes that
    share one mask value; 0 means that each element has its own, None that a sample has one.
    """
    check_arrays(name, x=x)
    try:
        real("p", p, least=0.0, most=1.0)
        for word, number in (("step", step), ("first", first)):
            _check_counter(word, number, x)
    except PortacnnError as error:
        raise error.at(name)
    if x.ndim != per_channel + 2 if per_channel else x.ndim < 1:
        expected = "(N, C" + ", spatial" * per_channel + ")" if per_channel else "(N, ...)"
        raise ShapeError(f"expected an input {expected}, got {describe(x)}", name)
    p = p if training else 0.0
    length = x.shape[1] if per_channel else prod(x.shape[1:]) if per_channel == 0 else 1
    return drop(x, p, length, _key(seed, "dropout", path), step, first, keep=keep)


def _check_counter(name: str, number: Any, x: Array) -> None:
    if hasattr(number, "shape"):
        source = backend_of(number)
        if tuple(number.shape) != () or not source.xp.isdtype(number.dtype, "signed integer"):
            raise ArgumentError(
                f"{name} must be a whole number or a 0-dimensional integer array, got "
                f"{describe(number)}"
            )
        if source.name != backend_of(x).name or number.device != x.device:
            raise ArrayError(
                f"{name} must be on the device of x: expected {describe(x)}, got {describe(number)}"
            )
    elif (counted := as_int(number)) is None or not 0 <= counted <= LARGEST:
        raise ArgumentError(f"{name} must be a whole number of at least 0, got {number!r}")


def dropout(
    x: Array,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int,
    path: str = "",
    step: Any = 0,
    first: Any = 0,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Set each element to zero with probability p and divide the others by 1 - p, as torch's
    dropout.

    Srivastava et al., 2014. The expected value of an element stays the same.

    Args:
        x: (N, ...), floating point.
        p: the probability of a zero, 0 to 1.
        training: if False, y equals x.
        seed, path: the key of the mask. Equal seed, path, step and position give the same mask on
            every backend.
        step: the training step: an int, or a 0-dimensional integer array on x's device.
        first: the position of x's first sample in the global batch: an int or an array, as
            ``step``.
        keep: store what ``dropout_backward`` needs.

    Returns:
        y, with the shape of x, and the cache.

    Raises:
        ArgumentError: if p is outside 0..1, or a step or position is negative.
        ShapeError: if x has no axes.
        ArrayError: if x is not floating point, or step or first is on another device.

    Example:
        >>> y, cache = ops.dropout(np.ones((2, 4)), 0.5, seed=1)
        >>> y
        array([[2., 2., 0., 2.],
               [0., 2., 0., 0.]])
        >>> ops.dropout_backward(np.ones((2, 4)), cache)
        array([[2., 2., 0., 2.],
               [0., 2., 0., 0.]])
    """
    return _dropout("dropout", x, p, training, 0, seed, path, step, first, keep)


def dropout1d(
    x: Array,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int,
    path: str = "",
    step: Any = 0,
    first: Any = 0,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Set whole channels of x (N, C, L) to zero with probability p (Tompson et al., 2015).

    Arguments, results and errors are those of ``dropout``. The mask has one value per channel of a
    sample.

    >>> y, cache = ops.dropout1d(np.ones((1, 4, 3)), 0.5, seed=1)
    >>> y[:, :, 0]
    array([[2., 2., 0., 2.]])
    >>> np.array_equal(ops.dropout1d_backward(np.ones_like(y), cache), y)
    True
    """
    return _dropout("dropout1d", x, p, training, 1, seed, path, step, first, keep)


def dropout2d(
    x: Array,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int,
    path: str = "",
    step: Any = 0,
    first: Any = 0,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Set whole channels of x (N, C, H, W) to zero with probability p (Tompson et al., 2015).

    Arguments, results and errors are those of ``dropout``. The mask has one value per channel of a
    sample.

    >>> y, cache = ops.dropout2d(np.ones((1, 4, 3, 3)), 0.5, seed=1)
    >>> y[:, :, 0, 0]
    array([[2., 2., 0., 2.]])
    >>> np.array_equal(ops.dropout2d_backward(np.ones_like(y), cache), y)
    True
    """
    return _dropout("dropout2d", x, p, training, 2, seed, path, step, first, keep)


def dropout3d(
    x: Array,
    p: float = 0.5,
    training: bool = True,
    *,
    seed: int,
    path: str = "",
    step: Any = 0,
    first: Any = 0,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Set whole channels of x (N, C, D, H, W) to zero with probability p (Tompson et al., 2015).

    Arguments, results and errors are those of ``dropout``. The mask has one value per channel of a
    sample.

    >>> y, cache = ops.dropout3d(np.ones((1, 4, 2, 2, 2)), 0.5, seed=1)
    >>> y[:, :, 0, 0, 0]
    array([[2., 2., 0., 2.]])
    >>> np.array_equal(ops.dropout3d_backward(np.ones_like(y), cache), y)
    True
    """
    return _dropout("dropout3d", x, p, training, 3, seed, path, step, first, keep)


def stochastic_depth(
    x: Array,
    p: float,
    training: bool = True,
    *,
    seed: int,
    path: str = "",
    step: Any = 0,
    first: Any = 0,
    keep: bool = True,
) -> tuple[Array, Cache | None]:
    """Set whole samples of x (N, ...) to zero with probability p; divide the others by 1 - p.

    Huang et al., 2016; torchvision.ops.stochastic_depth with mode "row". Otherwise as ``dropout``.

        >>> import numpy as np
        >>> from portacnn import ops
        >>> y, cache = ops.stochastic_depth(np.ones((4, 2)), 0.5, seed=1)
        >>> sorted(set(y.reshape(-1).tolist())), ops.stochastic_depth_backward(y, cache).shape
        ([0.0, 2.0], (4, 2))
    """
    return _dropout("stochastic_depth", x, p, training, None, seed, path, step, first, keep)


dropout_backward = stochastic_depth_backward = drop_backward
dropout1d_backward = dropout2d_backward = dropout3d_backward = drop_backward
