"""Networks: ``Model``, which classifies, and the architectures made of it."""

from portacnn.models.model import Model, load
from portacnn.models.simple_conv_net import SimpleConvNet

__all__ = ["Model", "SimpleConvNet", "load"]
