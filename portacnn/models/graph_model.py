"""A ``Model`` whose layers are a graph."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from portacnn.arguments import wholes
from portacnn.errors import ArgumentError, ArrayError, PortacnnError, ShapeError
from portacnn.layers import Graph, Layer
from portacnn.layers.base import Shape
from portacnn.models.model import Model
from portacnn.ops.dispatch import not_complex
from portacnn.runtime import Array, backend_of, cast, describe, is_float
from portacnn.text import listed


class GraphModel(Model):
    """A ``Graph`` that is a ``Model``: it predicts, trains and is saved. ``portacnn.onnx.load``
    returns it.

    Args:
        nodes: (name, layer, inputs), see ``Graph``.
        inputs: name and shape of each input, for a network with several. Samples are then rows with
            the elements of all inputs. ``predict``, ``Trainer`` and the others take a dictionary
            {name: array} too.
        outputs: name and shape of each output, for a network with several. A sample's output is a
            row with the elements of all outputs. ``predict`` returns a dictionary {name: array}.

    Parameters have the path of their node: "conv1.weight".

    Attributes:
        input_shapes, output_shapes: by name, the shapes of several inputs and outputs; empty for
            one.
    """

    def __init__(
        self,
        *nodes: tuple[str, Layer, Sequence[str]],
        inputs: Sequence[tuple[str, Sequence[int]]] = (),
        outputs: Sequence[tuple[str, Sequence[int]]] = (),
    ) -> None:
        super().__init__(graph=Graph(*nodes))
        try:
            self.input_shapes, self.output_shapes = _parts(inputs), _parts(outputs)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def is_described_by_children(self) -> bool:
        return type(self).__init__ is GraphModel.__init__

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        if not self.is_described_by_children():
            return super().arguments()
        nodes, options = self.children["graph"].arguments()
        for name, shapes in (("inputs", self.input_shapes), ("outputs", self.output_shapes)):
            if shapes:
                options[name] = [[part, list(shape)] for part, shape in shapes.items()]
        return nodes, options

    def child_path(self, name: str) -> str:
        return self.path  # the graph adds no segment to paths

    def infer(self, shape: Shape) -> Shape:
        sizes = sum(map(prod, self.input_shapes.values()))
        if self.input_shapes and shape != (sizes,):
            raise ShapeError(f"expected samples ({sizes},) for the inputs, got {shape}", self.where)
        made = super().infer(shape)
        sizes = sum(map(prod, self.output_shapes.values()))
        if self.output_shapes and made != (sizes,):
            raise ShapeError(f"expected ({sizes},) for the outputs, got {made}", self.where)
        return made

    @property
    def classes(self) -> int:
        """The number of outputs. Raises ShapeError if the network has several outputs, or a
        sample's output several axes."""
        if self.output_shapes:
            raise ShapeError(
                f"expected a network with one output, but it has {listed([*self.output_shapes])}; "
                "load it with outputs=",
                self.where,
            )
        return super().classes

    def received(self, x: Any, what: str = "x") -> Array:
        """See ``Model.received``. Several inputs may be a dictionary; the result is a row for each
        sample."""
        if not isinstance(x, Mapping):
            return super().received(x, what)
        if set(x) != set(self.input_shapes):
            raise ArgumentError(
                f"{what} must be a dictionary of {listed([*self.input_shapes]) or 'no inputs'}, "
                f"got {listed([*x])}",
                self.where,
            )
        rows, counts = [], set()
        for name, shape in self.input_shapes.items():
            part = self.home.share(self._part(x[name], name, shape))
            counts.add(part.shape[0])
            rows.append(self.home.xp.reshape(part, (part.shape[0], prod(shape))))
        if len(counts) > 1:
            raise ShapeError(f"{what}: the inputs have {sorted(counts)} samples", self.where)
        return self.home.xp.concat(rows, axis=1)

    def _part(self, x: Any, name: str, shape: Shape) -> Array:
        x = super().received(x, name)
        source = backend_of(x)
        if tuple(x.shape[1:]) != shape or x.ndim < 1:
            raise ShapeError(
                f"{name}: expected (N, {', '.join(map(str, shape))}), got {describe(x)}", self.where
            )
        if source.xp.isdtype(x.dtype, "complex floating"):
            raise not_complex(x, self.where, name)
        if not is_float(source.xp, x.dtype):
            raise ArrayError(f"{name}: expected floating point, got {describe(x)}", self.where)
        return cast(x, source.dtype(self.dtype))

    def predict(self, x: Any, batch_size: int | None = None) -> Any:
        """Return the outputs (N, ...) of samples x; a dictionary of them by name if there are
        several. See ``Model.predict``.

        Args:
            x: (N, *input_shape), or a dictionary of inputs by name.
        """
        y = super().predict(x, batch_size)
        return self.split(y) if self.output_shapes else y

    def split(self, y: Array) -> dict[str, Array]:
        """Return several outputs by name, (N, *shape), from the rows that ``model(x)`` returns."""
        first, parts = 0, {}
        for name, shape in self.output_shapes.items():
            last = first + prod(shape)
            parts[name] = backend_of(y).xp.reshape(y[:, first:last], (y.shape[0], *shape))
            first = last
        return parts


def _parts(parts: Sequence[Any]) -> dict[str, Shape]:
    """Return names and shapes, checked."""
    found: dict[str, Shape] = {}
    for part in parts:
        if not isinstance(part, list | tuple) or len(part) != 2 or not isinstance(part[0], str):
            raise ArgumentError(f"expected pairs (name, shape), got {part!r:.200}")
        if part[0] in found:
            raise ArgumentError(f"there are two called {part[0]!r:.200}")
        found[part[0]] = wholes("shape", part[1], 1)
    return found
