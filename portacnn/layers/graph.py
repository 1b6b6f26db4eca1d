"""``Graph``: a directed acyclic graph of layers. Each node takes the outputs of one or several
earlier nodes.

The forward pass runs the nodes in the given order and drops each value after its last use. The
backward pass runs them in reverse order and adds the gradients of a value that was used several
times. It skips nodes whose gradients are not needed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from portacnn.errors import ArgumentError, PortacnnError
from portacnn.layers.base import Layer, Shape
from portacnn.layers.container import Sequential
from portacnn.layers.freezing import learns
from portacnn.layers.join import Arithmetic, Join
from portacnn.layers.limits import count_layer
from portacnn.layers.passes import asks_dx, one_backward_pass
from portacnn.layers.running import Prepared, Trail, back, first_result, is_observed, run, run_part
from portacnn.layers.stages import ConvUnit, bounds_of
from portacnn.layers.units import Unit, takes
from portacnn.ops.fused import conv_unit
from portacnn.ops.join import add
from portacnn.runtime import Array, backend_of

__all__ = ["Graph"]

INPUT = "input"
"""The name of a graph's input, reserved."""
_LONGEST = 64  # the maximum number of layers in a chain


class Node(NamedTuple):
    """A layer, its name, and the names of the nodes that are its inputs."""

    name: str
    layer: Layer
    inputs: tuple[str, ...]


class _Chain(NamedTuple):
    """Consecutive nodes. Each has the previous one as its only input, and is that one's only
    user."""

    layer: Layer  # one layer, or a Sequential that runs several (some of them as one op)
    inputs: tuple[str, ...]
    output: str
    dropped: tuple[str, ...]  # the values not used after it


class Graph(Layer):
    """Named layers with named inputs: x (N, *S) -> y (N, *OUT), the value of the last node.

        Graph(
            ("conv1", Conv2d(3, 8, 3, padding=1), ["input"]),
            ("relu1", ReLU(), ["conv1"]),
            ("conv2", Conv2d(8, 8, 3, padding=1), ["relu1"]),
            ("sum", Arithmetic("add"), ["conv2", "relu1"]),
        )

    A node's name is its path, and may have dots: parameters are "conv1.weight" or
    "layer1.0.conv1.weight".

    Args:
        nodes: (name, layer, inputs), in the order in which they run. An input is the name of an
            earlier node, or "input". A layer with several inputs is a ``Join``. Several nodes may
            share one layer.

    Raises:
        ArgumentError: there are no nodes, a name is used twice, an input is not an earlier node, or
            a value is not used.
    """

    def __init__(self, *nodes: tuple[str, Layer, Sequence[str]]) -> None:
        try:
            self._set(tuple(self._taken(node) for node in nodes))
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        for node in self.nodes:
            super().adopt(node.name, node.layer)
        self.children.sealed = True

    nodes: tuple[Node, ...]

    def adopt(self, name: str, layer: Layer) -> None:
        """Make ``layer`` the layer of the node called ``name``."""
        self._set(
            tuple(node._replace(layer=layer) if node.name == name else node for node in self.nodes)
        )
        super().adopt(name, layer)

    def _set(self, nodes: tuple[Node, ...]) -> None:
        self._check(nodes)
        self.nodes, self._chains = nodes, tuple(_chained(nodes))
        self._inference_chains = tuple(_chained(_with_sums(nodes)))

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        if self.is_described_by_children():
            return [(name, layer, list(inputs)) for name, layer, inputs in self.nodes], {}
        return super().arguments()

    def is_described_by_children(self) -> bool:
        return type(self).__init__ is Graph.__init__

    def _taken(self, node: Any) -> Node:
        if not isinstance(node, list | tuple) or len(node) != 3:
            raise ArgumentError(f"expected nodes (name, layer, inputs), got {node!r}")
        name, layer, inputs = node
        if not isinstance(name, str) or not name or name == INPUT:
            raise ArgumentError(
                f'a node\'s name must be text, not empty and not "{INPUT}", got {name!r}'
            )
        if not isinstance(layer, Layer):
            raise ArgumentError(f"{name!r} must be a layer, got {layer!r}")
        if isinstance(inputs, str) or not all(isinstance(i, str) for i in inputs):
            raise ArgumentError(f"the inputs of {name!r} must be a list of names, got {inputs!r}")
        return Node(name, layer, tuple(inputs))

    @staticmethod
    def _check(nodes: Sequence[Node]) -> None:
        if not nodes:
            raise ArgumentError("expected at least one node")
        known, used = {INPUT}, set[str]()
        for name, layer, inputs in nodes:
            if name in known:
                raise ArgumentError(f"there are two nodes called {name!r}")
            if missing := [i for i in inputs if i not in known]:
                raise ArgumentError(f"the input {missing[0]!r} of {name!r} is not an earlier node")
            if isinstance(layer, Join):
                layer.check_count(len(inputs))
            elif len(inputs) != 1:
                raise ArgumentError(
                    f"{name!r}, a {type(layer).__name__}, takes one input, got {len(inputs)}"
                )
            known.add(name)
            used.update(inputs)
        if unused := [node.name for node in nodes[:-1] if node.name not in used]:
            raise ArgumentError(
                f"the output of {unused[0]!r} is not used; remove the node or use it as an input"
            )

    def infer(self, shape: Shape) -> Shape:
        shapes: dict[str, Shape] = {INPUT: shape}
        for name, layer, inputs in self.nodes:
            given: Any = tuple(shapes[i] for i in inputs)
            shapes[name] = layer.plan(
                given if isinstance(layer, Join) else given[0], self.child_path(name)
            )
        taken: set[str] = set()
        for layer in self.walk():
            names = (*layer.declared, *layer.declared_buffers)
            for path in map(layer.full_name, (name for name in names if name not in layer.tied)):
                if path in taken:
                    raise ArgumentError(f"two layers have state at {path!r}; rename one of them")
                taken.add(path)
        return shapes[self.nodes[-1].name]

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        trail, values = Trail(), {INPUT: x}
        chains = self._inference_chains if not train and not keep else self._chains
        wanted = _wants(chains, asks_dx(self)) if keep else set()
        for chain in chains:
            given: Any = [values[name] for name in chain.inputs]
            given = given if isinstance(chain.layer, Join) else given[0]
            asked = any(name in wanted for name in chain.inputs)
            y, cache = run_part(chain.layer, given, train, keep, asked)
            for name in chain.dropped:
                del values[name]
            values[chain.output] = y
            trail.append((chain, cache))
        return values[self.nodes[-1].name], trail if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        trail = Trail.taken(cache, self.where)
        wanted = _wants([chain for chain, _ in trail], need_dx)
        grads: dict[str, list[Array]] = {trail[-1][0].output: [dy]}
        with one_backward_pass():
            while trail:
                (layer, inputs, output, _), kept = trail.pop()
                if output not in wanted:
                    continue
                parts = grads.pop(output)
                ask = any(name in wanted for name in inputs)
                dx_of: Any = back(layer, parts[0] if len(parts) == 1 else add(parts), kept, ask)
                if not ask:
                    continue
                for name, dx in zip(
                    inputs, dx_of if isinstance(layer, Join) else [dx_of], strict=True
                ):
                    if name in wanted:
                        grads.setdefault(name, []).append(dx)
        return add(grads[INPUT]) if need_dx else None

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        functions, values, chains = [], {INPUT: x}, self._inference_chains
        for layer, inputs, output, _ in chains:
            given: Any = [values[name] for name in inputs]
            given = given if isinstance(layer, Join) else given[0]
            functions.append(layer.prepare(given))
            values[output] = first_result(functions[-1], given)

        def run(x: Array) -> Array:
            values = {INPUT: x}
            for function, (layer, inputs, output, dropped) in zip(functions, chains, strict=True):
                given: Any = [values[name] for name in inputs]
                y = function(given if isinstance(layer, Join) else given[0])
                for name in dropped:
                    del values[name]
                values[output] = y
            return values[self.nodes[-1].name]

        backend = backend_of(x)
        return Prepared(lambda x: backend.run(run, x), values[self.nodes[-1].name])


class _Sum(Join):
    """A convolution, with or without batch norm, the sum of its output and another value, and an
    activation, in inference: [x, other] -> y. They run as one op if the shapes are equal."""

    def __init__(self, unit: ConvUnit, total: Layer, activation: Layer | None) -> None:
        count_layer(-1)  # its layers are counted already
        self._unit, self._total, self._activation = unit, total, activation
        after = [total] if activation is None else [total, activation]
        for number, layer in enumerate([*unit.layers, *after]):
            self.adopt(str(number), layer)

    def _arguments(self, x: list[Array]) -> Unit | None:
        """Return the arguments of ``conv_unit``; None if it does not support this sum."""
        try:
            unit = self._unit.unit(x[0], bounds_of(self._activation))
        except PortacnnError as error:
            raise error.at(self._unit.where, over=True)
        return unit if takes(unit, x) else None

    def forward(self, x: Any, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        observed = any(map(is_observed, self.children.values()))
        if not observed and (unit := self._arguments(x)) is not None:
            return conv_unit(x, *unit), None
        y, other = x
        for layer in self.children.values():
            y, _ = run(layer, [y, other] if layer is self._total else y, train, keep)
        return y, None

    def prepare(self, x: Any) -> Callable[[Any], Array]:
        unit = self._arguments(x)
        return super().prepare(x) if unit is None else conv_unit.prepare(x, *unit)


def _with_sums(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes for inference: a sum with the output of a convolution that nothing else uses
    is a ``_Sum``, together with the activation after it."""
    uses, made = _uses(nodes), {node.name: node for node in nodes}
    users = {name: node for node in nodes for name in node.inputs}
    place = {node.name: number for number, node in enumerate(nodes)}
    new: dict[str, Node | None] = {}  # what is instead of a node, by its name
    for node in nodes:
        if type(node.layer) is not Arithmetic or node.layer.kind_ != "add":
            continue
        # the later input first: its convolution need not wait for the other
        for name in sorted(node.inputs, key=lambda name: place.get(name, -1), reverse=True):
            taken = _convolution(name, made, uses)
            if taken and not any(one.name in new for one in taken):
                break
        else:
            continue
        last = users[node.name] if uses.get(node.name) == 1 else node
        last = node if bounds_of(last.layer) is None else last
        total = _Sum(
            ConvUnit({one.name: one.layer for one in taken}),
            node.layer,
            None if last is node else last.layer,
        )
        (other,) = (given for given in node.inputs if given != name)
        new |= dict.fromkeys([*(one.name for one in taken), last.name])
        new[node.name] = Node(last.name, total, (taken[0].inputs[0], other))
    return [one for node in nodes if (one := new.get(node.name, node)) is not None]


def _convolution(name: str, made: dict[str, Node], uses: dict[str, int]) -> list[Node]:
    """Return the nodes of the convolution, and of the batch norm after it, that compute a value
    which is used once; none if something else computes it."""
    taken: list[Node] = []
    while name in made and uses[name] == 1 and len(taken) < 2:
        taken.insert(0, made[name])
        if ConvUnit.adds([node.layer for node in taken]):
            return taken
        name = taken[0].inputs[0]
    return []


def _uses(nodes: Sequence[Node]) -> dict[str, int]:
    """Return how often each value is an input."""
    uses: dict[str, int] = {}
    for node in nodes:
        for name in node.inputs:
            uses[name] = uses.get(name, 0) + 1
    return uses


def _chained(nodes: Sequence[Node]) -> Iterator[_Chain]:
    """Yield the nodes, grouped into chains, in order."""
    uses = _uses(nodes)
    rows: list[list[Node]] = []
    for node in nodes:
        before = rows[-1] if rows else []
        follows = before and node.inputs == (before[-1].name,) and uses[before[-1].name] == 1
        # a Sequential passes on one array only
        joins = any(isinstance(n.layer, Join) for n in (node, *before[:1]))
        if follows and not joins and len(before) < _LONGEST:
            before.append(node)
        else:
            rows.append([node])
    last = {name: number for number, row in enumerate(rows) for name in row[0].inputs}
    for number, row in enumerate(rows):
        layer = row[0].layer if len(row) == 1 else _sequence(row)
        inputs = row[0].inputs
        yield _Chain(
            layer, inputs, row[-1].name, tuple({name for name in inputs if last[name] == number})
        )


def _sequence(row: list[Node]) -> Layer:
    count_layer(-1)  # a chain is not a layer of the network
    return Sequential(*(node.layer for node in row))


def _wants(chains: Sequence[_Chain], need_dx: bool) -> set[str]:
    """Return the names of the values whose gradients are needed: values that depend on a trainable
    parameter, or with ``need_dx`` on the input."""
    wanted = {INPUT} if need_dx else set()
    for layer, inputs, output, _ in chains:
        if any(name in wanted for name in inputs) or learns(layer):
            wanted.add(output)
    return wanted
