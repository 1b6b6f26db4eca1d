"""Constants of a loss (class weights) on the device. They are transferred once, not in each
step."""

from collections.abc import Iterable
from functools import cache
from typing import Any

from portacnn.arguments import as_float, listed, told
from portacnn.errors import ArgumentError
from portacnn.runtime import Array, backend_of


def numbers(name: str, values: Any) -> tuple[float, ...] | None:
    """Return one or several numbers as a tuple of floats, or None for None. Raises ArgumentError if
    one is negative or not finite, or all are 0."""
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


@cache  # kept forever: a captured step reads this memory
def _sent(xp: Any, values: tuple[float, ...], dtype: Any, device: Any) -> Array:
    return xp.asarray(values, dtype=dtype, device=device)


def on_device(values: tuple[float, ...], like: Array, dtype: Any = None) -> Array:
    """Return the numbers (C,) on the device and in the dtype of ``like``. Repeated calls return the
    same array."""
    return _sent(backend_of(like).xp, values, dtype or like.dtype, like.device)


def along_outputs(array: Array, ndim: int) -> Array:
    """Reshape (C,) to (C, 1, ...), which broadcasts to outputs (N, C, ...) of ``ndim`` axes."""
    return backend_of(array).xp.reshape(array, (array.shape[0], *(1,) * (ndim - 2)))
