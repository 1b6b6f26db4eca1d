"""ONNX: models handed to others' tools, and taken in from them. docs/onnx.md says what goes and
what comes.

``export`` wants the extra: ``pip install "portacnn[onnx]"``; ``load`` needs nothing beside
portacnn.
"""

from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.export import export
from portacnn.onnx.load import load

__all__ = ["GraphBuilder", "emitter", "export", "load"]
