"""Checks of plain numbers that ops and layers take: what has no meaning is refused before anything is computed."""

from math import isfinite
from typing import Any

from portacnn.errors import ArgumentError


def real(
    name: str, value: Any, *, least: float | None = None, above: float | None = None, most: float | None = None
) -> Any:
    """``value`` itself, where it is a finite number within these bounds. Raises ArgumentError."""
    bounds = [
        *([f"at least {least}"] if least is not None else []),
        *([f"above {above}"] if above is not None else []),
        *([f"at most {most}"] if most is not None else []),
    ]
    number = hasattr(value, "__float__") and not hasattr(value, "shape") and not isinstance(value, bool)
    if (
        not number
        or not isfinite(value)
        or (least is not None and value < least)
        or (above is not None and value <= above)
        or (most is not None and value > most)
    ):
        raise ArgumentError(
            f"{name} must be a finite number{' ' if bounds else ''}{' and '.join(bounds)}, got {value!r}"
        )
    return value


def one_of(name: str, value: Any, *choices: str) -> Any:
    """``value`` itself, where it is one of the words. Raises ArgumentError."""
    if value not in choices:
        listed = ", ".join(f'"{choice}"' for choice in choices)
        raise ArgumentError(f"{name} must be one of {listed}; got {value!r}")
    return value
