"""The order of an activation's bytes in memory, under a shape that is always (N, C, *S).

Batch-last means that the bytes lie in the order (C, *S, N): the slices that convolution, pooling
and padding take are then long contiguous runs, and bias and activation run along rows. The portable
ops compute in this order and give back a permuted view. S stands for the spatial axes.
"""

from portacnn.runtime import Array, backend_of


def batch_last(x: Array) -> Array:
    """(N, C, *S) seen as (C, *S, N): a view, and contiguous where the backend keeps the batch last
    in memory."""
    return backend_of(x).xp.permute_dims(x, (*range(1, x.ndim), 0))


def batch_first(x: Array) -> Array:
    """(C, *S, N) seen as (N, C, *S): undoes ``batch_last``."""
    return backend_of(x).xp.permute_dims(x, (x.ndim - 1, *range(x.ndim - 1)))


def pack(x: Array) -> Array:
    """``x`` laid out as its backend prefers: itself where it is so already. For where a batch
    enters a network."""
    backend = backend_of(x)
    if backend.layout == "batch_first" or x.ndim < 3:
        return x
    return batch_first(backend.contiguous(batch_last(x)))
