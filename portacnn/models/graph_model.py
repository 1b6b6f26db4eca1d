"""A ``Model`` whose layers are a graph."""

from collections.abc import Sequence
from typing import Any

from portacnn.layers import Graph, Layer
from portacnn.models.model import Model


class GraphModel(Model):
    """A ``Graph`` that is a ``Model``: it predicts, trains and is saved. ``portacnn.onnx.load``
    returns it.

    Args:
        nodes: (name, layer, inputs), see ``Graph``.

    Parameters have the path of their node: "conv1.weight".
    """

    def __init__(self, *nodes: tuple[str, Layer, Sequence[str]]) -> None:
        super().__init__(graph=Graph(*nodes))

    def is_described_by_children(self) -> bool:
        return type(self).__init__ is GraphModel.__init__

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        return (
            self.children["graph"].arguments()
            if self.is_described_by_children()
            else super().arguments()
        )

    def child_path(self, name: str) -> str:
        return self.path  # the graph adds no segment to paths
