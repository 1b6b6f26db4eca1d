"""Pure functions on arrays, each with its backward: written once against the array API standard.

An op follows its arrays: library and device come from the input. ``y, cache = conv2d(x, weight, ...)`` keeps in ``cache`` what
``dx, dweight, dbias = conv2d_backward(dy, cache)`` needs, and with ``keep=False`` nothing. No op changes its inputs, but for
those in ``update``, which are there to do so.
"""

from portacnn.ops.activation import (
    elu,
    elu_backward,
    gelu,
    gelu_backward,
    leaky_relu,
    leaky_relu_backward,
    relu,
    relu_backward,
    sigmoid,
    sigmoid_backward,
    silu,
    silu_backward,
    softplus,
    softplus_backward,
    tanh,
    tanh_backward,
)
from portacnn.ops.conv import conv2d, conv2d_backward
from portacnn.ops.dispatch import Cache, use_kernels
from portacnn.ops.dropout import (
    dropout,
    dropout1d,
    dropout1d_backward,
    dropout2d,
    dropout2d_backward,
    dropout3d,
    dropout3d_backward,
    dropout_backward,
)
from portacnn.ops.linear import linear, linear_backward
from portacnn.ops.loss import (
    binary_cross_entropy_with_logits,
    binary_cross_entropy_with_logits_backward,
    mse_loss,
    mse_loss_backward,
    softmax_cross_entropy,
    softmax_cross_entropy_backward,
)
from portacnn.ops.norm import (
    batch_norm,
    batch_norm_backward,
    group_norm,
    group_norm_backward,
    instance_norm,
    instance_norm_backward,
    layer_norm,
    layer_norm_backward,
)
from portacnn.ops.pool import avg_pool2d, avg_pool2d_backward, max_pool2d, max_pool2d_backward
from portacnn.ops.response_norm import local_response_norm, local_response_norm_backward
from portacnn.ops.softmax import log_softmax, log_softmax_backward, softmax, softmax_backward
from portacnn.ops.special import erf
from portacnn.ops.update import adam_update, momentum_update, sgd_update
from portacnn.ops.windows import col2im, im2col

__all__ = [
    "Cache",
    "adam_update",
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "binary_cross_entropy_with_logits",
    "binary_cross_entropy_with_logits_backward",
    "col2im",
    "conv2d",
    "conv2d_backward",
    "dropout",
    "dropout1d",
    "dropout1d_backward",
    "dropout2d",
    "dropout2d_backward",
    "dropout3d",
    "dropout3d_backward",
    "dropout_backward",
    "elu",
    "elu_backward",
    "erf",
    "gelu",
    "gelu_backward",
    "group_norm",
    "group_norm_backward",
    "im2col",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "leaky_relu",
    "leaky_relu_backward",
    "linear",
    "linear_backward",
    "local_response_norm",
    "local_response_norm_backward",
    "log_softmax",
    "log_softmax_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "momentum_update",
    "mse_loss",
    "mse_loss_backward",
    "relu",
    "relu_backward",
    "sgd_update",
    "sigmoid",
    "sigmoid_backward",
    "silu",
    "silu_backward",
    "softmax",
    "softmax_backward",
    "softmax_cross_entropy",
    "softmax_cross_entropy_backward",
    "softplus",
    "softplus_backward",
    "tanh",
    "tanh_backward",
    "use_kernels",
]
