"""Containers: layers made of layers. One after the other, side by side, and around a shortcut.

They nest in any way, and each is a layer as any other: what it is given goes forward to those inside it, what comes back goes
backward through them in the reverse order. Where a path forks, the gradients of its branches are added.
"""

from collections.abc import Callable, Sequence
from typing import Any

from portacnn.arguments import one_of
from portacnn.errors import ArgumentError, PortacnnError, ShapeError, StateError
from portacnn.layers.activation import ReLU
from portacnn.layers.base import Layer, Shape
from portacnn.layers.stages import Fused, Stage, observed, stages
from portacnn.ops.fused import add_relu, add_relu_backward
from portacnn.ops.join import add, concat_channels, split_channels
from portacnn.runtime import Array, backend_of, describe


class Holder(Layer, abstract=True):
    """A layer with children, which stay those that its constructor took: what runs was made of them.

    An attribute may name a layer that is in the network already, and no other: that one would neither run nor learn.
    """

    def _seal(self) -> None:
        """At the end of the constructor: from now on the children stay as they are."""
        self.children.sealed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            held = vars(self).get(name)
            if (isinstance(value, Layer) or isinstance(held, Layer)) and self.children.sealed:
                self._check_alias(name, held, value)
        super().__setattr__(name, value)

    def _check_alias(self, name: str, held: Any, value: Any) -> None:
        inside = any(value is layer for layer in self.walk())
        if value is not held and (isinstance(held, Layer) or name in self.children or not inside):
            raise StateError(
                f"the layer {name!r} cannot be set: the layers of a network cannot be exchanged or added. Make a new network "
                "of the layers that it is to have, and give it the weights with load_state_dict(state, strict=False)",
                self.where,
            )

    def __delattr__(self, name: str) -> None:
        if isinstance(vars(self).get(name), Layer) and self.children.sealed:
            raise StateError(f"the layer {name!r} cannot be taken away; make a new network without it", self.where)
        super().__delattr__(name)


class _Container(Holder):
    """Taking layers in, running them, and going back through them."""

    def _adopt(self, name: str, layer: Layer, present: set[int]) -> None:
        """Make ``layer`` the child called ``name``. ``present``: the ids of all layers that are in already, this one's added."""
        if not isinstance(layer, Layer):
            raise ArgumentError(f"{name!r} is no layer: {layer!r}", type(self).__name__)
        if not name or "." in name:
            raise ArgumentError(f"a layer's name must not be empty or have dots, got {name!r}", type(self).__name__)
        if name in self.children:
            raise ArgumentError(f"there are two layers called {name!r}", type(self).__name__)
        own = {id(inner) for inner in layer.walk()}
        if not present.isdisjoint(own):
            raise ArgumentError(f"{name!r} is in this network already; give each place a layer of its own")
        present |= own
        self.children[name] = layer

    def _adopt_all(self, layers: Sequence[Layer], named: dict[str, Layer]) -> None:
        """Those without a name are called "0", "1", ..."""
        present = set[int]()
        for name, layer in [*((str(i), layer) for i, layer in enumerate(layers)), *named.items()]:
            self._adopt(name, layer, present)
        self._seal()

    def _run(self, child: Stage, x: Array, train: bool, keep: bool) -> Array:
        """A child's forward; its errors say where they happened and what the child was given."""
        try:
            return child.forward(x, train=train, keep=keep)
        except PortacnnError as error:
            if not child.children:
                error.at(child.where, over=True)
                if "input " not in error.message:
                    error.message += f" (input {describe(x)})"
            raise

    def _return(self, child: Stage, dy: Array, need_dx: bool) -> Array | None:
        """A child's backward, left out where nobody asks for what it would give."""
        if need_dx or _learns(child):
            return child.backward(dy, need_dx=need_dx)
        child.forget()
        return None


def _learns(layer: Stage) -> bool:
    return any(inner.params for inner in layer.walk())


class Sequential(_Container):
    """Layers that run one after the other: ``Sequential(conv1=Conv2d(1, 8, 3), relu1=ReLU())``.

    Layers given without a name are called "0", "1", ..., as in torch.nn.Sequential. Without any, it gives back its input.
    """

    def __init__(self, *layers: Layer, **named: Layer) -> None:
        self._adopt_all(layers, named)
        self.stages = self._ran = list(stages(self.children))

    stages: list[Stage]
    """What runs, in this order: the layers, some that follow each other as one."""
    _ran: list[Stage]

    def infer(self, shape: Shape) -> Shape:
        for name, child in self.children.items():
            shape = child.plan(shape, self.child_path(name))
        return shape

    def _parts(self) -> list[Stage]:
        """What runs now. Where somebody has put a function of their own over a layer's forward or backward, it runs by itself."""
        return [
            part
            for stage in self.stages
            for part in (stage.layers if isinstance(stage, Fused) and any(map(observed, stage.layers)) else [stage])
        ]

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        keep = train if keep is None else keep
        self._ran = self._parts()
        for part in self._ran:
            x = self._run(part, x, train, keep)
        return x

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        parts = self._ran
        # Without a wish for dx, the backward pass ends at the first part that learns anything.
        first = 0 if need_dx else next((i for i, part in enumerate(parts) if _learns(part)), len(parts))
        grad: Array | None = dy
        for index in range(len(parts) - 1, first - 1, -1):
            grad = parts[index].backward(grad, need_dx=need_dx or index > first)
        for part in parts[:first]:
            part.forget()
        return grad if need_dx else None

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        functions = []
        for stage in self.stages:
            functions.append(stage.prepare(x))
            x = functions[-1](x)

        def run(x: Array) -> Array:
            for function in functions:
                x = function(x)
            return x

        backend = backend_of(x)
        return lambda x: backend.run(run, x)


class Residual(_Container):
    """y = activation(body(x) + shortcut(x)), the block of residual networks (He et al., 2015): x (N, *S) -> y (N, *OUT).

        Residual(
            Sequential(conv1=Conv2d(64, 128, 3, 2, 1), bn1=BatchNorm2d(128), relu=ReLU(), conv2=Conv2d(128, 128, 3, 1, 1)),
            Sequential(Conv2d(64, 128, 1, 2), BatchNorm2d(128)),
            activation=ReLU(),
        )

    The body adds no segment to the paths of what is in it: in a block at "layer1.0" they are layer1.0.conv1.weight and, for
    the shortcut, layer1.0.downsample.0.weight, as in torchvision's ResNets.

    Args:
        body: any layer.
        shortcut: a layer that gives what the body gives; None for x itself.
        activation: a layer that takes the sum; None for the sum itself.
        shortcut_name: the shortcut's segment in paths.

    Raises:
        ArgumentError: no layers, or, when the network is built, two of them with the same path.
        ShapeError: when it is built: body and shortcut give different shapes.
    """

    def __init__(
        self,
        body: Layer,
        shortcut: Layer | None = None,
        *,
        activation: Layer | None = None,
        shortcut_name: str = "downsample",
    ) -> None:
        present = set[int]()
        self._adopt("body", body, present)
        if shortcut is not None:
            self._adopt(shortcut_name, shortcut, present)
        if activation is not None:
            self._adopt("activation", activation, present)
        self.body, self.shortcut, self.activation, self.shortcut_name = body, shortcut, activation, shortcut_name
        self._seal()

    def child_path(self, name: str) -> str:
        return self.path if name == "body" else super().child_path(name)

    def infer(self, shape: Shape) -> Shape:
        outputs = {name: child.plan(shape, self.child_path(name)) for name, child in self._parallel().items()}
        body, short = outputs["body"], outputs.get(self.shortcut_name, shape)
        if body != short:
            given = "the input itself is" if self.shortcut is None else "the shortcut gives"
            raise ShapeError(
                f"the body gives {body}, {given} {short}, and the two are added; a shortcut such as "
                "Conv2d(channels, out_channels, 1, stride) can bring them together"
            )
        if self.activation is not None:
            body = self.activation.plan(body, self.child_path("activation"))
        self._check_paths()
        return body

    def _parallel(self) -> dict[str, Layer]:
        return {name: child for name, child in self.children.items() if child is not self.activation}

    def _check_paths(self) -> None:
        """As the body's layers lie beside the shortcut in the paths, they might have its name."""
        taken = {layer.path for layer in self.body.walk()}
        for name in self.children:
            if name != "body" and self.child_path(name) in taken:
                raise ArgumentError(
                    f"the body has a layer at {self.child_path(name)!r} already; give the body's a name of its own "
                    f"(or the shortcut: shortcut_name=...), or put the body into a Sequential(inner=...)"
                )

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        keep = train if keep is None else keep
        y = self._run(self.body, x, train, keep)
        short = x if self.shortcut is None else self._run(self.shortcut, x, train, keep)
        try:
            if type(self.activation) is ReLU and not observed(self.activation):
                y, cache = add_relu([y, short], keep=keep)
                self._keep(cache)
                return y
            y = add([y, short])
        except PortacnnError as error:
            raise error.at(self.where)
        if keep:
            self._cache = None  # the activation has it
        return y if self.activation is None else self._run(self.activation, y, train, keep)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        if self._cache is not None:
            grad = add_relu_backward(dy, self._kept())
        else:
            grad = dy if self.activation is None else self.activation.backward(dy)
        dx = self._return(self.body, grad, need_dx)
        short = grad if self.shortcut is None else self._return(self.shortcut, grad, need_dx)
        return add([dx, short]) if need_dx else None


class Branches(_Container):
    """Layers that run side by side on the same input: x (N, *S) -> y, their outputs set side by side or added.

    An inception block (Szegedy et al., 2014) is

        Branches(
            Conv2d(192, 64, 1),
            Sequential(Conv2d(192, 96, 1), ReLU(), Conv2d(96, 128, 3, padding=1)),
            Sequential(MaxPool2d(3, 1, 1), Conv2d(192, 32, 1)),
        )

    and gives 64 + 128 + 32 channels. Branches without a name are called "0", "1", ...; an empty ``Sequential()`` hands on x.

    Args:
        join: "concat": (N, C1, *S), (N, C2, *S), ... -> (N, C1 + C2 + ..., *S); "add": all of one shape, added.

    Raises:
        ArgumentError: no layers, or another ``join``.
        ShapeError: when the network is built: outputs that cannot be joined.
    """

    def __init__(self, *layers: Layer, join: str = "concat", **named: Layer) -> None:
        try:
            self.join = one_of("join", join, "concat", "add")
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        if not layers and not named:
            raise ArgumentError("expected at least one layer", type(self).__name__)
        self._adopt_all(layers, named)

    def infer(self, shape: Shape) -> Shape:
        outputs = {name: child.plan(shape, self.child_path(name)) for name, child in self.children.items()}
        listed = ", ".join(f"{name} {output}" for name, output in outputs.items())
        first, *others = outputs.values()
        if self.join == "add":
            if any(output != first for output in others):
                raise ShapeError(f"branches that are added must give one shape; they give {listed}")
            return first
        if not first or any(len(output) != len(first) or output[1:] != first[1:] for output in others):
            raise ShapeError(
                f"branches that are set side by side may differ in their channels only; they give {listed}"
            )
        return (sum(output[0] for output in outputs.values()), *first[1:])

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        keep = train if keep is None else keep
        parts = [self._run(child, x, train, keep) for child in self.children.values()]
        added = self.join == "add"
        self._keep(None if not keep else () if added else [part.shape[1] for part in parts])
        try:
            return add(parts) if added else concat_channels(parts)
        except PortacnnError as error:
            raise error.at(self.where)

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        channels = self._kept()
        try:
            shares = [dy] * len(self.children) if self.join == "add" else split_channels(dy, channels)
        except PortacnnError as error:
            raise error.at(self.where)
        grads = [
            self._return(child, share, need_dx) for child, share in zip(self.children.values(), shares, strict=True)
        ]
        return add(grads) if need_dx else None
