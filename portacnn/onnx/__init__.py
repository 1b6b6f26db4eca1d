"""ONNX: export models for other tools, and load their models. docs/onnx.md lists what is supported.

``export`` needs an extra: ``pip install "portacnn[onnx]"``. ``load`` needs nothing but portacnn.
"""

from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.export import export
from portacnn.onnx.load import load

__all__ = ["GraphBuilder", "emitter", "export", "load"]
