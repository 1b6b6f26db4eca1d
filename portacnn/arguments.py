"""Checks of the plain numbers and words that ops and constructors take: each gives it back, or says what it must be."""

from collections.abc import Callable, Mapping
from math import inf, isfinite
from numbers import Real
from operator import index
from typing import Any

from portacnn.errors import ArgumentError


def plain(value: Any, known: Callable[[Any], Any] = lambda value: None) -> Any:
    """A value as JSON has it: numbers of any library as Python's, tuples as lists; what it has no word for stays.

    ``known`` is asked first, about this value and those within it; it gives None for what it does not know.
    """
    if (described := known(value)) is not None:
        return described
    if isinstance(value, Mapping):
        return {name: plain(inner, known) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, known) for inner in value]
    if value is None or isinstance(value, bool | int | str | float):
        return value
    if hasattr(value, "__index__"):
        return int(value)
    return float(value) if hasattr(value, "__float__") else value


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return index(value)


def real(name: str, value: Any, *, least: float = -inf, above: float = -inf, most: float = inf) -> Any:
    """``value`` itself, where it is a finite Python or NumPy number within these bounds. Raises ArgumentError."""
    number = hasattr(value, "__float__") and getattr(value, "shape", ()) == () and not isinstance(value, bool)
    if not number or not isfinite(value) or not (least <= value <= most and above < value):
        if most < inf:
            bounds = f" in {least:g}..{most:g}"
        else:
            bounds = f" of at least {least:g}" if least > -inf else f" above {above:g}" if above > -inf else ""
        raise ArgumentError(f"{name} must be a finite number{bounds}, got {value!r}")
    return value


def one_of(name: str, value: Any, *choices: str) -> Any:
    """``value`` itself, where it is one of the words. Raises ArgumentError."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ArgumentError(f"{name} must be one of {listed}; got {value!r}")
    return value


def not_negative(name: str, value: Any) -> float:
    """A finite number of 0 or more."""
    if not _is_number(value) or not 0.0 <= value < inf:
        raise ArgumentError(f"{name} must be a number of 0 or more, got {value!r}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if not _is_number(value) or not 0.0 < value < inf:
        raise ArgumentError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def fraction(name: str, value: Any) -> float:
    """A number of 0 or more and below 1."""
    if not _is_number(value) or not 0.0 <= value < 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} < 1, got {value!r}")
    return float(value)


def share(name: str, value: Any) -> float:
    """A number from 0 to 1, both among them."""
    if not _is_number(value) or not 0.0 <= value <= 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} <= 1, got {value!r}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
