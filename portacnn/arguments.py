"""Checks of the numbers and strings that ops and constructors take. Each returns the value, or
raises ArgumentError with the expected one.

A number is returned as Python's own ``int`` or ``float``. Callers use the returned value, not the
argument: 3 is accepted for 3.0, but powers of an int grow without limit, and those of a float
overflow.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from math import inf, isfinite, nan
from operator import index
from typing import Any, TypeVar

from portacnn.errors import ArgumentError

LARGEST = 2**63 - 1
"""The largest integer argument: the largest int64, the type of counts and sizes on a device."""


def plain(value: Any, known: Callable[[Any], Any] = lambda value: None) -> Any:
    """Convert a value to JSON types: numbers of any library to Python's, tuples to lists. Other
    values are returned unchanged.

    ``known`` is called first, for this value and those inside it; it returns None for values that
    it does not handle.
    """
    if (described := known(value)) is not None:
        return described
    if isinstance(value, Mapping):
        return {name: plain(inner, known) for name, inner in value.items()}
    value = listed(value)
    if isinstance(value, list | tuple):
        return [plain(inner, known) for inner in value]
    if value is None or isinstance(value, bool | int | str | float):
        return value
    if hasattr(value, "__index__"):
        return int(value)
    return float(value) if hasattr(value, "__float__") else value


def listed(value: Any) -> Any:
    """Convert an array with axes to nested lists of Python numbers; other values are returned
    unchanged.
    """
    return value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0 else value


def told(value: Any) -> str:
    """Return ``repr(value)`` for a message, shortened if it is long."""
    try:
        text = repr(value)
    except ValueError:  # an int with more digits than Python prints
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_int(value: Any) -> int | None:
    """Convert an integer of any library to Python's int. Returns None for all other values,
    including booleans.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return index(value)
    except TypeError:  # an array with several elements, or of floats
        return None


def as_float(value: Any) -> float:
    """Convert a real number of any library to Python's float. Returns NaN for all other values,
    including booleans and numbers that overflow.
    """
    if type(value) is float:
        return value
    if (
        isinstance(value, bool)
        or not hasattr(value, "__float__")
        or getattr(value, "shape", ()) != ()
    ):
        return nan
    if any(word in str(getattr(value, "dtype", "")) for word in ("bool", "complex")):
        return nan
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return nan


def whole(name: str, value: Any, least: int, most: int = LARGEST) -> int:
    """Return an integer from ``least`` to ``most``. Raises ArgumentError."""
    number = as_int(value)
    if number is None or number < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {told(value)}")
    if number > most:
        raise ArgumentError(f"{name} must be at most {most}, got {told(value)}")
    return number


def wholes(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Return a tuple of integers of at least ``least``. Raises ArgumentError."""
    values = listed(values)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ArgumentError(
            f"{name} must be several whole numbers, such as (1, 2); got {told(values)}"
        )
    return tuple(whole(name, value, least) for value in values)


def flag(name: str, value: Any) -> bool:
    """Return True or False, of Python or NumPy. Raises ArgumentError."""
    if not isinstance(value, bool) and not (
        getattr(value, "shape", None) == () and str(value.dtype) == "bool"
    ):
        raise ArgumentError(f"{name} must be True or False, got {told(value)}")
    return bool(value)


def real(
    name: str, value: Any, *, least: float = -inf, above: float = -inf, most: float = inf
) -> float:
    """Return a finite number within these bounds. Raises ArgumentError."""
    number = as_float(value)
    if not isfinite(number) or not (least <= number <= most and above < number):
        if most < inf:
            bounds = f" in {least:g}..{most:g}"
        else:
            bounds = (
                f" of at least {least:g}"
                if least > -inf
                else f" above {above:g}"
                if above > -inf
                else ""
            )
        raise ArgumentError(f"{name} must be a finite number{bounds}, got {told(value)}")
    return number


def one_of(name: str, value: Any, *choices: str) -> Any:
    """Return ``value`` if it is one of the strings. Raises ArgumentError."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ArgumentError(f"{name} must be one of {listed}; got {told(value)}")
    return value


def not_negative(name: str, value: Any) -> float:
    """Return a finite number of at least 0. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 <= number < inf:
        raise ArgumentError(f"{name} must be a number of 0 or more, got {told(value)}")
    return number


def positive(name: str, value: Any) -> float:
    """Return a finite number above 0. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 < number < inf:
        raise ArgumentError(f"{name} must be a number above 0, got {told(value)}")
    return number


def fraction(name: str, value: Any) -> float:
    """Return a number of at least 0 and below 1. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 <= number < 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} < 1, got {told(value)}")
    return number


def share(name: str, value: Any) -> float:
    """Return a number from 0 to 1, inclusive. Raises ArgumentError."""
    number = as_float(value)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} <= 1, got {told(value)}")
    return number


Function = TypeVar("Function", bound=Callable[..., Any])


def answering_keywords(what: str, cures: Mapping[str, str]) -> Callable[[Function], Function]:
    """Decorate the function called ``what``, so that the TypeError for an unknown keyword names the
    right one.

    ``cures`` maps the keywords of other libraries to what to write instead.
    """

    def decorated(function: Function) -> Function:
        known = [name for name in signature(function).parameters if name not in ("self", "cls")]

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if unknown := [name for name in kwargs if name not in known]:
                hints = [f"{name}{_hint(name, known, cures)}" for name in unknown]
                raise TypeError(
                    f"{what} does not take {', '.join(hints)}; it takes {', '.join(known)}"
                )
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated


def _hint(name: str, known: list[str], cures: Mapping[str, str]) -> str:
    from difflib import get_close_matches

    if name in cures:
        return f" (write {cures[name]})"
    return "".join(f" (did you mean {match}?)" for match in get_close_matches(name, known, 1))
