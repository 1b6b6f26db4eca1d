"""Checks of plain numbers that ops and layers take: what has no meaning is refused before anything is computed."""

from math import inf, isfinite
from typing import Any

from portacnn.errors import ArgumentError


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
