"""Gradients by finite differences: slow, but computed from forward passes only.

They are an independent check of backward passes.
"""

from collections.abc import Callable
from itertools import product

from portacnn.runtime import Array, HostArray, backend_of


def numerical_gradient(f: Callable[[], float], p: Array, h: float = 1e-4) -> Array:
    """Return the central differences (f(p + h) - f(p - h)) / 2h for each element of p.

    Args:
        f: a function of no arguments that reads p and returns a number; called twice per element.
        p: an array of any library. Each element is changed in place and restored.
        h: the step. 1e-4 suits float64; float32 needs about 1e-2 and has two or three correct
            digits.

    Returns:
        The gradient, with the shape, dtype and device of p.

    Example:
        >>> import numpy as np
        >>> from portacnn.gradient_check import numerical_gradient
        >>> p = np.array([1.0, 3.0])
        >>> np.round(numerical_gradient(lambda: float(np.sum(p * p)), p), 4)
        array([2., 6.])
    """
    backend = backend_of(p)
    host = backend.to_host(p)
    gradient = host.copy()

    def write(values: HostArray) -> None:
        p[...] = backend.xp.asarray(values, dtype=p.dtype, device=p.device, copy=True)

    def value(index: tuple[int, ...], entry: float) -> float:
        changed = host.copy()
        changed[index] = entry
        write(changed)
        return f()

    try:
        for index in product(*(range(n) for n in p.shape)):
            entry = float(host[index])
            gradient[index] = (value(index, entry + h) - value(index, entry - h)) / (2 * h)
    finally:
        write(host)
    return backend.xp.asarray(gradient, dtype=p.dtype, device=p.device, copy=True)
