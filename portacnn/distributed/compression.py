"""Sums of 16-bit floats: half the bytes on the wire for gradients, at the price of their last bits.

An MPI or NCCL sum of 16-bit values would round after each addition. Here each rank sums one part of
the array in float32:

1. Each rank rounds its values to 16 bits and sends part r to rank r (all-to-all).
2. Rank r sums its part over all ranks, in their order, in float32, and rounds the sum.
3. Each rank collects the sums of all parts (all-gather).

A rank sends 2 * (n - 1) / n * 2 bytes per element, as in a ring of 16-bit floats. All ranks get the
same bits, which depend on the number of ranks only. NaN and infinity stay, and values beyond the
range become infinite, so that a training sees them.
"""

# Notation: L elements, n ranks, P elements of a part. Codes are uint16, the bits of 16-bit floats.

from typing import Protocol

from portacnn.device_runtime import Array
from portacnn.distributed.base import Half
from portacnn.errors import ArgumentError
from portacnn.runtime import backend_of, is_float

_BLOCK = 1 << 16  # elements that are rounded at a time: they stay in the CPU's cache
_QUIET_NAN = 0x7FC0


class Exchange(Protocol):
    """The transport that ``compressed_sum`` needs. Arrays are contiguous, (n, P) or (P,)."""

    size: int

    def all_to_all(self, send: Array, receive: Array) -> None:
        """Fill ``receive[r]`` with what rank r has in ``send[rank]``."""

    def all_gather(self, send: Array, receive: Array) -> None:
        """Fill ``receive[r]`` with what rank r has in ``send``."""


def check_compress(compress: str | None, array: Array, op: str) -> None:
    """Raise ArgumentError unless this reduction can be compressed so."""
    if compress not in (None, "bfloat16", "float16"):
        raise ArgumentError(f"compress must be 'bfloat16', 'float16' or None; got {compress!r}")
    if compress is not None and (op != "sum" or not is_float(backend_of(array).xp, array.dtype)):
        raise ArgumentError(
            f"compress={compress!r} is for sums of floats; got {op} of {array.dtype}"
        )


def compressed_sum(values: Array, half: Half, exchange: Exchange) -> None:
    """Replace ``values`` (L,), of NumPy or CuPy, by their sum over all ranks."""
    xp, n, L = backend_of(values).xp, exchange.size, values.shape[0]
    P = -(-L // n)
    codes = xp.zeros((n, P), dtype=xp.uint16)
    received = xp.empty_like(codes)
    flat = xp.reshape(codes, (-1,))
    for block in _blocks(values):
        flat[block] = encode(values[block], half)
    exchange.all_to_all(codes, received)
    sums = xp.empty((P,), dtype=xp.uint16)
    for block in _blocks(sums):
        total = decode(received[0, block], half)
        for rank in range(1, n):
            total += decode(received[rank, block], half)
        sums[block] = encode(total, half)
    exchange.all_gather(sums, codes)
    for block in _blocks(values):
        values[block] = decode(flat[block], half)


def encode(values: Array, half: Half) -> Array:
    """Round floats to 16 bits, to nearest, ties to even; return their bits as uint16."""
    xp = backend_of(values).xp
    if half == "float16":
        return values.astype(xp.float16).view(xp.uint16)
    values = values.astype(xp.float32, copy=False)
    bits = values.view(xp.uint32)
    rounded = ((bits >> 16) & 1) + bits  # bfloat16 is the upper half of float32
    rounded += 0x7FFF
    rounded >>= 16
    return xp.where(values != values, _QUIET_NAN, rounded).astype(xp.uint16)


def decode(codes: Array, half: Half) -> Array:
    """Return the floats that uint16 bits stand for, in float32."""
    xp = backend_of(codes).xp
    if half == "float16":
        return codes.view(xp.float16).astype(xp.float32)
    return (codes.astype(xp.uint32) << 16).view(xp.float32)


def _blocks(array: Array) -> list[slice]:
    """Return the slices of a 1-D array that are worked on at a time."""
    length = array.shape[0]
    step = _BLOCK if backend_of(array).name == "numpy" else max(length, 1)
    return [slice(begin, min(begin + step, length)) for begin in range(0, length, step)]
