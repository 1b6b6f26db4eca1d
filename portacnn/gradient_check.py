"""Gradients by finite differences: slow, and made of nothing but forward passes, so that there is
something to check against."""

from collections.abc import Callable
from itertools import product

from portacnn.runtime import Array, HostArray, backend_of


def numerical_gradient(f: Callable[[], float], p: Array, h: float = 1e-4) -> Array:
    """The central differences (f(p + h) - f(p - h)) / 2h for each entry of p, which f must read.

    Args:
        f: gives a number; called twice for each entry.
        p: an array of any library; each entry is changed in place and put back as it was.
        h: the step; 1e-4 suits float64, float32 wants some 1e-2 and gives two or three digits.

    Returns:
        The gradient, of p's shape, dtype and device.
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
