"""The tutorials' own names: what their readers paste runs, on any backend, with one changed import.

    from portacnn.scratch import *  # for common.layers, common.optimizer, dataset.mnist, ...

The names, signatures and shapes are those of "Deep Learning from Scratch" (Koki Saitoh;
"ゼロから作るDeep Learning", O'Reilly Japan, 2016), and ``corr2d`` that of "Dive into Deep
Learning". A thin layer over ``portacnn.ops``: library and device follow the arrays. Where the
tutorials are wrong this is right, and the docstring says so. docs/tutorials.md leads on from
here to portacnn's own names.

For anything new ``portacnn.layers`` and ``portacnn.Trainer`` are the better start: here weights and
gradients lie in dictionaries that layers and optimizer must share, and nothing checks a network as
a whole.
"""

from portacnn.ops import col2im, im2col
from portacnn.scratch.functions import (
    convolution_1d,
    convolution_2d,
    corr2d,
    cross_entropy_error,
    numerical_gradient,
    relu,
    sigmoid,
    softmax,
)
from portacnn.scratch.layers import (
    Affine,
    BatchNormalization,
    Convolution,
    Dropout,
    Pooling,
    Relu,
    Sigmoid,
    SoftmaxWithLoss,
)
from portacnn.scratch.mnist import load_mnist, load_mnist_sample
from portacnn.scratch.optimizers import SGD, AdaGrad, Adam, Momentum, Nesterov, RMSprop
from portacnn.scratch.simple_convnet import SimpleConvNet
from portacnn.scratch.trainer import Trainer

__all__ = [
    "SGD",
    "AdaGrad",
    "Adam",
    "Affine",
    "BatchNormalization",
    "Convolution",
    "Dropout",
    "Momentum",
    "Nesterov",
    "Pooling",
    "RMSprop",
    "Relu",
    "Sigmoid",
    "SimpleConvNet",
    "SoftmaxWithLoss",
    "Trainer",
    "col2im",
    "convolution_1d",
    "convolution_2d",
    "corr2d",
    "cross_entropy_error",
    "im2col",
    "load_mnist",
    "load_mnist_sample",
    "numerical_gradient",
    "relu",
    "sigmoid",
    "softmax",
]
