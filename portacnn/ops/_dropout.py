"""Dropout: the public functions. See ``masks`` for how a mask is drawn.

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
    """per_channel: the number of spatial axes that fall together, 0 for none; None for whole
    samples."""
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
                f"{name} must be where x is; {name} is {describe(number)}, x is {describe(x)}"
            )
    elif (counted := as_int(number)) is None or not 0 <= counted <= LARGEST:
        raise ArgumentError(f"{name} must be a whole number of 0 or more, got {number!r}")


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
    """Each number zero with probability p, the others divided by 1 - p (Srivastava et al., 2014),
    as torch's dropout.

    Args:
        x: (N, ...), floating point.
        p: the share to drop, 0 to 1.
        training: without it, nothing is dropped.
        seed, path: whose mask this is. The same seed, path, step and position give the same bits on
            every backend.
        step: the training step. A number, or a 0-dimensional integer array on x's device.
        first: the position of x's first sample in the global batch; as ``step``.
        keep: keep what ``dropout_backward`` needs.

    Returns:
        y, shaped as x, and the cache.

    Raises:
        ArgumentError: a p outside 0..1, a negative step or position.
        ShapeError, ArrayError: see the message.
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
    """Whole channels of x (N, C, L) zero with probability p (Tompson et al., 2015); otherwise as
    ``dropout``."""
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
    """Whole channels of x (N, C, H, W) zero with probability p (Tompson et al., 2015); otherwise as
    ``dropout``."""
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
    """Whole channels of x (N, C, D, H, W) zero with probability p (Tompson et al., 2015); otherwise
    as ``dropout``."""
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
    """Whole samples of x (N, ...) zero with probability p, the others divided by 1 - p (Huang et
    al., 2016), as torchvision.ops.stochastic_depth with mode "row"; otherwise as ``dropout``."""
    return _dropout("stochastic_depth", x, p, training, None, seed, path, step, first, keep)


dropout_backward = stochastic_depth_backward = drop_backward
dropout1d_backward = dropout2d_backward = dropout3d_backward = drop_backward
