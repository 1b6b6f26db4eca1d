"""The tutorials' own names: code from the tutorials runs on any backend after changing one import.

    from portacnn.scratch import *  # for common.layers, common.optimizer, dataset.mnist, ...

Names, signatures and shapes are those of "Deep Learning from Scratch" (Koki Saitoh;
"ゼロから作るDeep Learning", O'Reilly Japan, 2016), and ``corr2d`` is that of "Dive into Deep
Learning". It is a thin layer over ``portacnn.ops``: library and device follow the arrays. Errors of
the tutorials are corrected here, and the docstrings say so. docs/tutorials.md maps these names to
portacnn's own.

For new code use ``portacnn.layers`` and ``portacnn.Trainer``: here weights and gradients are in
dictionaries that layers and optimizer must share, and a network is not checked as a whole.
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
