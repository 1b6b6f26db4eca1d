"""``statistics_over``: batch norm over a batch whose samples are spread over several processes.

Within this context batch norm uses the mean and the variance of all processes' samples together, in
its forward and its backward pass. It is a context and no argument, because only the caller of a
whole training step knows of the other processes.

The processes' means and squared deviations are combined as in Chan et al., 1979. Sums of squares
would lose all digits if the mean is large compared with the deviation.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from portacnn.runtime import Array, backend_of

Total = Callable[[Array], None]
"""Adds a contiguous array over all processes, in place."""

_total: ContextVar[Total | None] = ContextVar("portacnn_statistics_over", default=None)


@contextmanager
def statistics_over(total: Total) -> Iterator[None]:
    """Make batch norm in training use the statistics of all processes within the context.

    All processes must run the same layers in the same order. Each needs at least one sample.

    Args:
        total: adds a contiguous array over all processes, in place.
    """
    token = _total.set(total)
    try:
        yield
    finally:
        _total.reset(token)


def shared_statistics() -> Total | None:
    """Return the function that adds an array over all processes; None outside the context."""
    return _total.get()


def is_shared() -> bool:
    """Return whether statistics are those of several processes. Kernels compute those of one."""
    return _total.get() is not None


def combined(
    terms: Sequence[Array], var: Array, count: int, total: Total
) -> tuple[Array, Array, Array, Array]:
    """Return mean and variance of all processes' values together, the own mean minus that mean, and
    the number of values, 0-dimensional.

    Args:
        terms: their sum is the mean of the own values; each is (...).
        var: (...), of the own values.
        count: the number of own values for each mean.
        total: see ``statistics_over``.
    """
    xp, dtype = backend_of(var).xp, var.dtype
    # in float32 each deviation would be wrong by the rounding error of the mean
    wide = dtype if dtype == xp.float64 else _widest(xp, var.device)
    own = xp.astype(terms[0], wide)
    for term in terms[1:]:
        own = own + xp.astype(term, wide)
    number = xp.full((1,), float(count), dtype=wide, device=var.device)
    sums = xp.concat([number, xp.reshape(own, (-1,)) * float(count)])
    total(sums)
    whole, mean = sums[0], xp.reshape(sums[1:] / sums[0], own.shape)
    above = own - mean
    squares = xp.reshape((xp.astype(var, wide) + above * above) * float(count), (-1,))
    total(squares)
    var = xp.reshape(squares / whole, own.shape)
    mean, var, above, whole = (xp.astype(each, dtype) for each in (mean, var, above, whole))
    return mean, var, above, whole


@lru_cache(maxsize=64)
def _widest(xp: Any, device: Any) -> Any:
    wide = "float64" in xp.__array_namespace_info__().dtypes(device=device)
    return xp.float64 if wide else xp.float32
