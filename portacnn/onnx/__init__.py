"""ONNX: models handed to others' tools. ``pip install "portacnn[onnx]"``; docs/onnx.md says what comes out."""

from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.export import export

__all__ = ["GraphBuilder", "emitter", "export"]
