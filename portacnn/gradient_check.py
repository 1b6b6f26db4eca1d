"""Gradients by finite differences: slow, and made of nothing but forward passes, so that there is something to check against."""

from collections.abc import Callable

from portacnn.runtime import Array, backend_of


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

    def value(entry: float, index: int) -> float:
        host.reshape(-1)[index] = entry
        p[...] = backend.xp.asarray(host, dtype=p.dtype, device=p.device, copy=True)
        return f()

    for index, entry in enumerate(host.reshape(-1).copy()):
        difference = value(entry + h, index) - value(entry - h, index)
        gradient.reshape(-1)[index] = difference / (2 * h)
        value_back = host.reshape(-1)
        value_back[index] = entry
    p[...] = backend.xp.asarray(host, dtype=p.dtype, device=p.device, copy=True)
    return backend.xp.asarray(gradient, dtype=p.dtype, device=p.device, copy=True)
