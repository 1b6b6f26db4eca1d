"""The memory layout of an activation, whose shape is always (N, C, *S).

Batch-last means that the bytes lie in the order (C, *S, N). The slices of convolution, pooling and
padding are then long contiguous runs, and bias and activation functions work along rows. The
portable ops compute in this order and return a permuted view. S stands for the spatial axes.
"""

from portacnn.runtime import Array, backend_of


def batch_last(x: Array) -> Array:
    """Return a view (C, *S, N) of x (N, C, *S). It is contiguous if the backend keeps the batch
    last in memory.
    """
    return backend_of(x).xp.permute_dims(x, (*range(1, x.ndim), 0))


def batch_first(x: Array) -> Array:
    """Return a view (N, C, *S) of x (C, *S, N): the inverse of ``batch_last``."""
    return backend_of(x).xp.permute_dims(x, (x.ndim - 1, *range(x.ndim - 1)))


def pack(x: Array) -> Array:
    """Return ``x`` in its backend's memory layout: x itself if it has that layout, else a copy.
    Used when a batch enters a network.
    """
    backend = backend_of(x)
    if backend.layout == "batch_first" or x.ndim < 3:
        return x
    return batch_first(backend.contiguous(batch_last(x)))
