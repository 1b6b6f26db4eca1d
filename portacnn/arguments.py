"""Checks of the plain numbers that constructors take: each gives the number back, or says what it must be."""

from math import inf
from numbers import Real
from operator import index
from typing import Any

from portacnn.errors import ArgumentError


def whole(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or index(value) < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return index(value)


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
