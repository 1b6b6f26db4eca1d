"""Batches from a data set on NumPy: gather rows in their stored dtype, then normalize and transpose
to batch-last in one array.

Bytes are transposed before they become floats, which moves a quarter of the memory. The work is
done per channel: a pass with a single scalar runs without a break, whereas one scalar per row of B
images would restart for each row.

Notation as in ops/batch.py: B images in the batch, C channels; P pixels in each.
"""

from math import prod
from typing import Any

import numpy as np

from portacnn.backends.numpy.memory import empty
from portacnn.backends.threads import in_pieces
from portacnn.ops.layout import batch_first
from portacnn.runtime import Kernel


def take_batch(images: np.ndarray, indices: Any = None, mean: Any = None, std: Any = None) -> Any:
    """Compute ``take_batch``. Declines inputs without spatial axes and calls that neither gather
    nor normalize.
    """
    if images.ndim < 3 or (indices is None and std is None):
        return NotImplemented
    chosen = images if indices is None else np.take(images, indices, axis=0)
    count, channels, *size = chosen.shape
    y = empty((channels, *size, count), images.dtype if std is None else std.dtype)
    pixels = chosen.reshape(count, channels, prod(size)).transpose(1, 2, 0)  # (C, P, B)
    out = y.reshape(pixels.shape)
    mean, std = (
        None if constant is None else constant.reshape(channels) for constant in (mean, std)
    )

    def turn(some: slice) -> None:
        for c in range(channels):
            come, to = pixels[c, some], out[c, some]
            if std is None:
                to[...] = come
                continue
            come = np.ascontiguousarray(come)
            if mean is not None:
                come = np.subtract(come, mean[c], out=to)
            np.divide(come, std[c], out=to)

    in_pieces(turn, prod(size), y.size)
    return batch_first(y)


KERNELS = {"take_batch": Kernel(take_batch)}
