"""Containers. They are written layer by layer, fused or not. An ONNX file has no containers, so a
file is read as one ``Graph``."""

from typing import Any

from portacnn import layers as L
from portacnn.layers.graph import INPUT
from portacnn.models.graph_model import GraphModel
from portacnn.models.model import Model
from portacnn.models.unet import UNet
from portacnn.onnx.builder import GraphBuilder, emitter


@emitter(L.Sequential, Model)
def write_sequential(graph: GraphBuilder, layer: Any, x: str) -> str:
    for child in layer.children.values():
        x = graph.layer(child, x)
    return x


@emitter(L.Residual)
def write_residual(graph: GraphBuilder, layer: Any, x: str) -> str:
    y = graph.layer(layer.body, x)
    short = x if layer.shortcut is None else graph.layer(layer.shortcut, x)
    y = graph.add("Add", [y, short])
    return y if layer.activation is None else graph.layer(layer.activation, y)


@emitter(L.Recompute)
def write_recompute(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.layer(layer.layer, x)


@emitter(L.Branches)
def write_branches(graph: GraphBuilder, layer: Any, x: str) -> str:
    parts = [graph.layer(child, x) for child in layer.children.values()]
    return graph.add("Sum", parts) if layer.join == "add" else graph.add("Concat", parts, axis=1)


@emitter(L.Graph)
def write_graph(graph: GraphBuilder, layer: Any, x: str) -> str:
    values = {INPUT: x}
    for name, child, inputs in layer.nodes:
        values[name] = graph.layer(child, *(values[i] for i in inputs))
    return values[layer.nodes[-1].name]


@emitter(GraphModel, UNet)
def write_graph_model(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.layer(layer.children["graph"], x)
