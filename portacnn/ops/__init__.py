"""Pure functions on arrays, each with its backward: written once against the array API standard.

An op follows its arrays: library and device come from the input. ``y, cache = conv2d(x, weight, ...)`` keeps in ``cache`` what
``dx, dweight, dbias = conv2d_backward(dy, cache)`` needs, and with ``keep=False`` nothing. No op changes its inputs, but for
those in ``update``, which are there to do so.
"""

from portacnn.ops.activation import relu, relu_backward, sigmoid, sigmoid_backward
from portacnn.ops.conv import conv2d, conv2d_backward
from portacnn.ops.dispatch import Cache, use_kernels
from portacnn.ops.linear import linear, linear_backward
from portacnn.ops.loss import softmax_cross_entropy, softmax_cross_entropy_backward
from portacnn.ops.pool import avg_pool2d, avg_pool2d_backward, max_pool2d, max_pool2d_backward
from portacnn.ops.update import (
    adagrad_update,
    adam_update,
    clip_by_global_norm,
    momentum_update,
    rmsprop_update,
    sgd_update,
)
from portacnn.ops.windows import col2im, im2col

__all__ = [
    "Cache",
    "adagrad_update",
    "adam_update",
    "avg_pool2d",
    "avg_pool2d_backward",
    "clip_by_global_norm",
    "col2im",
    "conv2d",
    "conv2d_backward",
    "im2col",
    "linear",
    "linear_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "momentum_update",
    "relu",
    "relu_backward",
    "rmsprop_update",
    "sgd_update",
    "sigmoid",
    "sigmoid_backward",
    "softmax_cross_entropy",
    "softmax_cross_entropy_backward",
    "use_kernels",
]
