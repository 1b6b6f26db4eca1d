"""Where randomness comes from: a seed and the name of what is drawn, on the host, the same on every
backend.

No global random state. Each draw has a generator of its own, made from the seed and a name (a
parameter's path; "shuffle" and an epoch), so that one more layer, another backend or another order
of calls changes nobody else's numbers.
"""

import hashlib
import secrets

import numpy as np

from portacnn.arguments import as_int
from portacnn.errors import ArgumentError
from portacnn.runtime import HostArray


def fresh_seed() -> int:
    """A seed nobody chose, for ``seed=None``; it is kept, so that the run can be told how to repeat
    itself."""
    return secrets.randbits(32)


def check_seed(seed: int | None) -> int:
    """``seed`` itself, or a fresh one for None. Raises ArgumentError for anything but a whole
    number."""
    if seed is None:
        return fresh_seed()
    number = as_int(seed)
    if number is None:
        raise ArgumentError(f"seed must be a whole number or None, got {seed!r}")
    return number


def words(seed: int, *name: object) -> tuple[int, int]:
    """Two 32-bit numbers that belong to ``name`` under ``seed``: the key of what is drawn on the
    device (dropout's masks)."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def generator(seed: int, *name: object) -> np.random.Generator:
    """The generator that belongs to ``name`` under ``seed``."""
    digest = hashlib.sha256(repr((seed, *name)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def permutation(seed: int, epoch: int, count: int) -> HostArray:
    """The order in which an epoch goes through ``count`` samples: int64 (count,)."""
    return generator(seed, "shuffle", epoch).permutation(count)
