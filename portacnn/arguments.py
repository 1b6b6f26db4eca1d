"""Checks of the plain numbers and words that ops and constructors take: each gives it back, or says
what it must be.

A number comes back as Python's own ``int`` or ``float``. Use what comes back, not what was given: 3
is a number as good as 3.0, but powers of the one grow without end, and those of the other overflow.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import signature
from math import inf, isfinite, nan
from operator import index
from typing import Any, TypeVar

from portacnn.errors import ArgumentError

LARGEST = 2**63 - 1
"""The largest whole number that any argument may be: the largest int64, as counts and sizes become
on a device."""


def plain(value: Any, known: Callable[[Any], Any] = lambda value: None) -> Any:
    """A value as JSON has it: numbers of any library as Python's, tuples as lists; what it has no
    word for stays.

    ``known`` is asked first, about this value and those within it; it gives None for what it does
    not know.
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
    """An array of numbers as lists of Python's; whatever else it is, as it is."""
    return value.tolist() if hasattr(value, "tolist") and getattr(value, "ndim", 0) > 0 else value


def told(value: Any) -> str:
    """A value for a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        return f"a {type(value).__name__} too long to print"
    return text if len(text) <= 200 else f"{text[:200]}..."


def as_int(value: Any) -> int | None:
    """A whole number of any library as Python's; None for all else, booleans among it."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        return None
    try:
        return index(value)
    except TypeError:  # an array of several, or of floats
        return None


def as_float(value: Any) -> float:
    """A real number of any library as Python's; NaN for all else, booleans among it, and for what
    no float can hold."""
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
    """A whole number of at least ``least``."""
    number = as_int(value)
    if number is None or number < least:
        raise ArgumentError(f"{name} must be a whole number of at least {least}, got {told(value)}")
    if number > most:
        raise ArgumentError(f"{name} must be at most {most}, got {told(value)}")
    return number


def wholes(name: str, values: Any, least: int) -> tuple[int, ...]:
    """Several whole numbers of at least ``least``."""
    values = listed(values)
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ArgumentError(
            f"{name} must be several whole numbers, such as (1, 2); got {told(values)}"
        )
    return tuple(whole(name, value, least) for value in values)


def flag(name: str, value: Any) -> bool:
    """True or False, of Python or NumPy."""
    if not isinstance(value, bool) and not (
        getattr(value, "shape", None) == () and str(value.dtype) == "bool"
    ):
        raise ArgumentError(f"{name} must be True or False, got {told(value)}")
    return bool(value)


def real(
    name: str, value: Any, *, least: float = -inf, above: float = -inf, most: float = inf
) -> float:
    """A finite number within these bounds. Raises ArgumentError."""
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
    """``value`` itself, where it is one of the words. Raises ArgumentError."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ArgumentError(f"{name} must be one of {listed}; got {told(value)}")
    return value


def not_negative(name: str, value: Any) -> float:
    """A finite number of 0 or more."""
    number = as_float(value)
    if not 0.0 <= number < inf:
        raise ArgumentError(f"{name} must be a number of 0 or more, got {told(value)}")
    return number


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    number = as_float(value)
    if not 0.0 < number < inf:
        raise ArgumentError(f"{name} must be a number above 0, got {told(value)}")
    return number


def fraction(name: str, value: Any) -> float:
    """A number of 0 or more and below 1."""
    number = as_float(value)
    if not 0.0 <= number < 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} < 1, got {told(value)}")
    return number


def share(name: str, value: Any) -> float:
    """A number from 0 to 1, both among them."""
    number = as_float(value)
    if not 0.0 <= number <= 1.0:
        raise ArgumentError(f"{name} must lie in 0 <= {name} <= 1, got {told(value)}")
    return number


Function = TypeVar("Function", bound=Callable[..., Any])


def answering_keywords(what: str, cures: Mapping[str, str]) -> Callable[[Function], Function]:
    """Decorate a function called ``what`` so that the TypeError for a keyword that it does not take
    names the right one.

    ``cures`` says what to write instead of keywords that people bring from other libraries.
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
