"""Write the inputs and outputs of a network with several: in the network they are parts of one row
for each sample."""

from collections.abc import Mapping, Sequence
from math import prod

from portacnn.layers.base import Shape
from portacnn.onnx.builder import GraphBuilder


def joined_inputs(graph: GraphBuilder, names: Sequence[str]) -> str:
    """Add what makes one row of several inputs, and return its name."""
    return graph.add("Concat", [graph.add("Flatten", [name], axis=1) for name in names], axis=1)


def split_outputs(graph: GraphBuilder, y: str, shapes: Mapping[str, Shape]) -> None:
    """Add what makes several outputs of one row, by name."""
    first = 0
    for name, shape in shapes.items():
        last = first + prod(shape)
        numbers = [graph.constant([n], dtype="int64") for n in (first, last, 1)]
        graph.reshape(graph.add("Slice", [y, *numbers]), (0, *shape))
        graph.nodes[-1].output[0] = name
        first = last
