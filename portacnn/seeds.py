"""Randomness from a seed and a name, generated on the host, equal on every backend.

There is no global random state. Each draw has its own generator, made from the seed and a name (the
path of a parameter; "shuffle" and an epoch). An additional layer, another backend or another order
of calls therefore does not change any other draw.
"""

import hashlib
import secrets

import numpy as np

from portacnn.arguments import as_int
from portacnn.errors import ArgumentError
from portacnn.runtime import HostArray


def fresh_seed() -> int:
    """Return a random seed, for ``seed=None``. The caller stores it, so that the run can be
    repeated.
    """
    return secrets.randbits(32)


def check_seed(seed: int | None) -> int:
    """Return ``seed``, or a random seed for None. Raises ArgumentError if it is not an integer."""
    if seed is None:
        return fresh_seed()
    number = as_int(seed)
    if number is None:
        raise ArgumentError(f"seed must be a whole number or None, got {seed!r}")
    return number


def words(seed: int, *name: object) -> tuple[int, int]:
    """Return the two 32-bit keys of ``name`` under ``seed``, for values drawn on the device
    (dropout masks).
    """
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def generator(seed: int, *name: object) -> np.random.Generator:
    """Return the NumPy generator of ``name`` under ``seed``.

    >>> from portacnn.seeds import generator
    >>> bool(generator(1, "fc").random() == generator(1, "fc").random())
    True
    """
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def permutation(seed: int, epoch: int, count: int) -> HostArray:
    """Return the order of ``count`` samples in an epoch: int64 (count,).

    >>> from portacnn.seeds import permutation
    >>> sorted(permutation(0, 1, 4).tolist())
    [0, 1, 2, 3]
    """
    return generator(seed, "shuffle", epoch).permutation(count)


def identity(count: int) -> HostArray:
    """Return 0, 1, ..., count - 1: int64 (count,)."""
    return np.arange(count)
