"""ONNX: models taken in from others' tools."""

from portacnn.onnx.load import load

__all__ = ["load"]
