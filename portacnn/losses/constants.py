"""A loss's own numbers (weights of classes) on the device: sent once, as a step sends nothing."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from portacnn.arguments import as_float, listed, told
from portacnn.errors import ArgumentError
from portacnn.runtime import Array, backend_of


def numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """Return a number or several, of 0 or more and not all 0, as a tuple of floats; None stays
    None. Raises ArgumentError."""
    if values is None:
        return None
    values = listed(values)
    several = values if isinstance(values, Iterable) and not isinstance(values, str) else [values]
    made = tuple(as_float(value) for value in several)
    if not all(0.0 <= number < float("inf") for number in made) or not any(made):
        raise ArgumentError(
            f"{name} must be finite numbers of 0 or more, one above 0; got {told(values)}"
        )
    return made


@cache  # never dropped: a captured step reads this memory again
def _sent(xp: Any, values: tuple[float, ...], dtype: Any, device: Any) -> Array:
    return xp.asarray(values, dtype=dtype, device=device)


def on_device(values: tuple[float, ...], like: Array, dtype: Any = None) -> Array:
    """Return the numbers (C,), beside ``like`` and of its dtype; the same array every time."""
    return _sent(backend_of(like).xp, values, dtype or like.dtype, like.device)


def along_outputs(array: Array, ndim: int) -> Array:
    """Return (C,) as (C, 1, ...), which broadcasts to outputs (N, C, ...) of ``ndim`` axes."""
    return backend_of(array).xp.reshape(array, (array.shape[0], *(1,) * (ndim - 2)))
