"""Random masks with the same bits on every backend, and the op that applies them (dropout).

There is no generator and no state. Whether an element is kept follows from a hash of its position.
Sample ``first + n`` of step ``step`` gets two 32-bit words from the layer's key. Element i of that
sample, counted in the order (C, *S) for any memory layout, is kept if the hash of i under these
words is at least p * 2^32. A mask therefore depends neither on strides nor on how a batch is split
between ranks or accumulation steps: each of those passes the ``first`` of its part.

The hash is computed in int64 and cut to 32 bits after each product, because torch's unsigned types
lack arithmetic. Factors below 2^31 in absolute value keep the product with a 32-bit word below
2^63.

Notation: N batch, C channels, S the spatial axes, L the number of independent mask values per
sample.
"""

from math import prod
from typing import Any

from portacnn.ops.dispatch import op
from portacnn.ops.layout import batch_first
from portacnn.runtime import Array, backend_of

WORD = 0xFFFFFFFF

# The rounds of "triple32" (Chris Wellons, "Prospecting for hash functions", 2018), a bijection of
# 32-bit words. The two factors of 2^31 or more are written as their negative twins modulo 2^32.
ROUNDS = ((17, 0xED5AD4BB - 2**32), (11, 0xAC4C1B51 - 2**32), (15, 0x31848BAB))
LAST_SHIFT = 14


def _round(x: Any, shift: int, factor: int) -> Any:
    return ((x ^ (x >> shift)) * factor) & WORD


def _hash(x: Any) -> Any:
    """Return a well-mixed 32-bit word of a Python int or of each element of an int64 array."""
    for shift, factor in ROUNDS:
        x = _round(x, shift, factor)
    return x ^ (x >> LAST_SHIFT)


def sample_words(key: tuple[int, int], step: Any, position: Any) -> tuple[Any, Any]:
    """Return two words per position in the global batch (int64), each a hash of all bits of step
    and position.

    Takes Python ints or int64 arrays. The two words come from the two halves of the key; two
    samples that share one word differ in the other.
    """
    first, second = key
    for part in (step & WORD, step >> 32 & WORD, position & WORD, position >> 32 & WORD):
        first, second = _hash(first ^ part), _hash(second ^ part)
    return first, second


def hashed(index: Any, first: Any, second: Any) -> Any:
    """Return word number ``index`` of samples with these two words; int64 arrays that broadcast.

    The second word enters after the first round, so that samples with similar first words do not
    get shifted copies of one sequence.
    """
    x = _round(index ^ first, *ROUNDS[0]) ^ second
    for shift, factor in ROUNDS[1:]:
        x = _round(x, shift, factor)
    return x ^ (x >> LAST_SHIFT)


@op()
def kept(like: Array, length: int, first: Array, second: Array, threshold: int) -> Array:
    """Return which of L elements of N samples are kept: booleans (N, L) in the memory layout of the
    backend of ``like``.

    first, second: the samples' words, int64 (N,).
    """
    backend = backend_of(like)
    xp = backend.xp
    last = backend.layout == "batch_last"
    index = xp.arange(length, dtype=xp.int64, device=like.device)
    index, first, second = (
        (index[:, None], first[None, :], second[None, :])
        if last
        else (index[None, :], first[:, None], second[:, None])
    )
    mask = hashed(index, first, second) >= threshold
    return mask.T if last else mask


@op()
def drop(
    x: Array, p: float, length: int, key: tuple[int, int], step: Any, first: Any, *, keep: bool
) -> tuple[Array, tuple | None]:
    """Apply a mask to x (N, C, *S): the op behind ``dropout`` (length C*S) channel dropout
    (length C) and stochastic depth (length 1).
    """
    backend = backend_of(x)
    xp = backend.xp
    n = x.shape[0]
    position = xp.arange(n, dtype=xp.int64, device=x.device) + _int64(x, first)
    one, other = sample_words(key, _int64(x, step), position)
    mask = kept(x, length, one, other, round(p * 2**32))
    whole = length == prod(x.shape[1:])
    if backend.layout == "batch_last":
        inner = x.shape[1:] if whole else (length, *(1,) * (x.ndim - 2))
        mask = batch_first(xp.reshape(mask.T, (*inner, n)))
    else:
        mask = xp.reshape(mask, x.shape if whole else (n, length, *(1,) * (x.ndim - 2)))
    scale = 1.0 / (1.0 - p) if p < 1.0 else 0.0
    return _masked(x, mask, scale), (mask, scale) if keep else None


@drop.backward
def drop_backward(dy: Array, saved: tuple) -> Array:
    """Return dx (N, C, *S): dy with the same mask and the same scale."""
    return _masked(dy, *saved)


def _masked(x: Array, mask: Array, scale: float) -> Array:
    return x * (backend_of(x).xp.astype(mask, x.dtype) * scale)


def _int64(x: Array, number: Any) -> Any:
    """Return a counter for arithmetic: a Python int unchanged, a 0-dimensional array on x's device
    as int64.
    """
    return (
        backend_of(number).xp.astype(number, backend_of(number).xp.int64)
        if hasattr(number, "shape")
        else int(number)
    )
