"""Layers: parameters and buffers with a forward and a backward pass. Every layer calls
``portacnn.ops`` and no array library.

A layer is public if its module's ``__all__`` lists it.
"""

from types import ModuleType as _ModuleType

from portacnn.layers.activation import *
from portacnn.layers.attention import *
from portacnn.layers.base import Layer as Layer
from portacnn.layers.container import *
from portacnn.layers.conv import *
from portacnn.layers.dropout import *
from portacnn.layers.graph import *
from portacnn.layers.join import *
from portacnn.layers.linear import *
from portacnn.layers.norm import *
from portacnn.layers.passes import *
from portacnn.layers.pool import *
from portacnn.layers.quantize import *
from portacnn.layers.receptive import *
from portacnn.layers.resize import *
from portacnn.layers.shape import *

__all__ = [
    name
    for name, value in tuple(globals().items())
    if not name.startswith("_") and not isinstance(value, _ModuleType)
]
