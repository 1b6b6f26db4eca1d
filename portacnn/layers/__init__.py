"""Layers: state, a forward and a backward. Every one is written on ``portacnn.ops`` and knows no array library."""

from portacnn.layers.activation import ReLU, Sigmoid
from portacnn.layers.base import Layer
from portacnn.layers.container import Sequential
from portacnn.layers.conv import Conv2d
from portacnn.layers.linear import Flatten, Linear
from portacnn.layers.pool import AvgPool2d, MaxPool2d

__all__ = ["AvgPool2d", "Conv2d", "Flatten", "Layer", "Linear", "MaxPool2d", "ReLU", "Sequential", "Sigmoid"]
