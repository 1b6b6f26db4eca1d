"""Dropout: an identity outside training."""

from typing import Any

from portacnn import layers as L
from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.importer import Importer, Value, for_training, operator
from portacnn.onnx.reading import Operation


@emitter(L.Dropout)
def write_dropout(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write a Dropout node, an identity at inference. Its attributes keep the ratio for
    training."""
    return graph.add("Dropout", [x, graph.constant(layer.p)]) if 0 < layer.p < 1 else x


@operator("Dropout")
def read_dropout(at: Importer, op: Operation) -> Value:
    """Read training mode, an attribute in opset 6 and an input from opset 12 on, as inference mode:
    the layer drops elements in training anyway."""
    op.ignore("seed")
    given = at.known(op, 2) if at.opset >= 12 else None
    if for_training(at, op) or (given is not None and given.array.any()):
        note = "Dropout is in training mode; predictions drop nothing"
        at.notes.setdefault(note, []).append(op.where)
    ratio = at.number(op, 1, "ratio", 0.5)
    return at.add(op, L.Dropout(0.5 if ratio is None else ratio), at.value(op))


@emitter(L.Dropout1d, L.Dropout2d, L.Dropout3d, L.StochasticDepth)
def write_channel_dropout(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Return x: ONNX has no dropout of whole channels or samples."""
    return x
