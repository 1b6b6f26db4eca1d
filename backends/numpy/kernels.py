"""NumPy's own versions of ops where the portable one is slow there: the table, and what is too small for a file of its own."""

from typing import Any

import numpy as np

from portacnn.backends.numpy.batch import take_batch
from portacnn.backends.numpy.conv import (
    conv,
    conv_backward,
    conv_relu,
    conv_relu_backward,
    prepare_conv,
    prepare_conv_relu,
)
from portacnn.backends.numpy.join import add, add_relu
from portacnn.backends.numpy.linear import (
    linear,
    linear_backward,
    linear_relu,
    linear_relu_backward,
    prepare_linear,
    prepare_linear_relu,
)
from portacnn.backends.numpy.norm import KERNELS as NORM_KERNELS
from portacnn.backends.numpy.pool import max_pool, max_pool_backward, relu, relu_backward
from portacnn.backends.numpy.updates import (
    adagrad_update,
    adam_update,
    clip_by_global_norm,
    momentum_update,
    rmsprop_update,
    sgd_update,
)
from portacnn.ops.layout import batch_first, batch_last
from portacnn.ops.masks import LAST_SHIFT, ROUNDS, WORD
from portacnn.ops.special import erf as portable_erf
from portacnn.runtime import Kernel

# Functions made of dozens of passes go through an array in pieces that stay in the cache.
_PIECE = 1 << 15


def erf(x: np.ndarray) -> Any:
    if x.size <= _PIECE:
        return NotImplemented
    xt = np.ascontiguousarray(batch_last(x))
    y = np.empty_like(xt)
    flat, out = xt.reshape(-1), y.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        out[start : start + _PIECE] = portable_erf.forward(flat[start : start + _PIECE])
    return batch_first(y)


def kept(like: np.ndarray, length: int, first: np.ndarray, second: np.ndarray, threshold: int) -> Any:
    """The same hash in uint32, whose products are cut to 32 bits by themselves."""
    if not 0 < threshold <= WORD:
        return NotImplemented
    first, second = first.astype(np.uint32), second.astype(np.uint32)
    mask = np.empty((length, first.size), dtype=np.bool_)
    rows = max(_PIECE // max(first.size, 1), 1)
    x = np.empty((rows, first.size), dtype=np.uint32)
    shifted = np.empty_like(x)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        x, shifted = x[: stop - start], shifted[: stop - start]
        np.bitwise_xor(np.arange(start, stop, dtype=np.uint32)[:, None], first, out=x)
        for number, (shift, factor) in enumerate(ROUNDS):
            np.right_shift(x, shift, out=shifted)
            x ^= shifted
            x *= np.uint32(factor & WORD)
            if number == 0:
                x ^= second
        np.right_shift(x, LAST_SHIFT, out=shifted)
        x ^= shifted
        np.greater_equal(x, np.uint32(threshold), out=mask[start:stop])
    return mask.T


KERNELS = {
    "take_batch": Kernel(take_batch),
    "conv": Kernel(conv, conv_backward, prepare_conv),
    "conv_relu": Kernel(conv_relu, conv_relu_backward, prepare_conv_relu),
    "linear": Kernel(linear, linear_backward, prepare_linear),
    "linear_relu": Kernel(linear_relu, linear_relu_backward, prepare_linear_relu),
    **NORM_KERNELS,
    "add": Kernel(add),
    "add_relu": Kernel(add_relu, relu_backward),
    "relu": Kernel(relu, relu_backward),
    "erf": Kernel(erf),
    "kept": Kernel(kept),
    "max_pool": Kernel(max_pool, max_pool_backward),
    "sgd_update": Kernel(sgd_update),
    "momentum_update": Kernel(momentum_update),
    "adagrad_update": Kernel(adagrad_update),
    "rmsprop_update": Kernel(rmsprop_update),
    "adam_update": Kernel(adam_update),
    "clip_by_global_norm": Kernel(clip_by_global_norm),
}
