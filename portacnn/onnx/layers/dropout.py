"""Dropout: an identity outside training."""

from typing import Any

from portacnn import layers as L
from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.importer import Importer, Value, for_inference, operator
from portacnn.onnx.reading import Operation


@emitter(L.Dropout)
def write_dropout(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write a Dropout node, an identity at inference. Its attributes keep the ratio for
    training."""
    return graph.add("Dropout", [x, graph.constant(layer.p)]) if 0 < layer.p < 1 else x


@operator("Dropout")
def read_dropout(at: Importer, op: Operation) -> Value:
    op.ignore("seed")
    for_inference(at, op)
    training = at.known(op, 2) if at.opset >= 12 else None
    if training is not None and training.array.any():
        raise op.wrong(
            "training_mode=True is not supported: it applies dropout at inference; export the "
            "network for inference"
        )
    ratio = at.number(op, 1, "ratio", 0.5)
    return at.add(op, L.Dropout(0.5 if ratio is None else ratio), at.value(op))


@emitter(L.Dropout1d, L.Dropout2d, L.Dropout3d, L.StochasticDepth)
def write_channel_dropout(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Return x: ONNX has no dropout of whole channels or samples."""
    return x
