"""Gradients against central differences in float64, along directions of which each changes all
elements."""

from collections.abc import Callable
from typing import Any

import numpy as np

from portacnn.testing.report import Fault

LIMIT = 1e-6
"""How far a slope may be off, relative to the sum of the absolute shares of all elements."""


def check_slope(
    gradient: Any, loss: Callable[[Any], float], at: Any, what: str, h: float = 1e-6
) -> float:
    """Return how far ``gradient`` is from the slope of ``loss``.

    Args:
        gradient: NumPy, float64.
        loss: a function of an array like ``at`` that returns a number.
        at: where the gradient was computed.

    Raises:
        Fault: if it is another shape, or further off than LIMIT.
    """
    if gradient.shape != at.shape:
        raise Fault(f"{what}: expected shape {at.shape}, got {gradient.shape}")
    worst = 0.0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        towards = rng.uniform(0.5, 1.5, at.shape) * rng.choice([-1.0, 1.0], at.shape)
        shares = gradient * towards
        slope = (loss(at + h * towards) - loss(at - h * towards)) / (2 * h)
        error = abs(slope - float(shares.sum())) / max(float(np.abs(shares).sum()), 1.0)
        if not error <= LIMIT:
            raise Fault(
                f"{what}: its slope along a direction is {shares.sum():.6g}, by central "
                f"differences it is {slope:.6g}"
            )
        worst = max(worst, error)
    return worst


def distinct(shape: tuple[int, ...], seed: int = 0) -> Any:
    """Return an array in which no two elements are nearer than 1e-3, and none is near 0 or another
    multiple of 1/8: no maximum is met by accident, and no kink."""
    count = int(np.prod(shape))
    order = np.random.default_rng(seed).permutation(count)
    return (order - count // 2 + 0.5).reshape(shape) / max(count, 8) * 2 + 0.0137 * (seed % 3)
