"""Containers: layers made of layers, in sequence, in parallel, or around a shortcut.

A container is a layer, so containers nest. The backward pass runs the children in reverse order.
The gradients of parallel branches are added.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from portacnn.arguments import one_of
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.layers.activation import ReLU
from portacnn.layers.base import Layer, Shape
from portacnn.layers.freezing import learns
from portacnn.layers.passes import (
    Moment,
    asks_dx,
    moment,
    one_backward_pass,
    recomputing,
)
from portacnn.layers.running import (
    Prepared,
    Trail,
    back,
    first_result,
    is_observed,
    run,
    run_joined,
    run_part,
)
from portacnn.layers.stages import Fused, bounds_of, inference_stages, returns_input, stages
from portacnn.ops.fused import Bounds, add_clip, add_relu, add_relu_backward
from portacnn.ops.join import add, concat_channels, split_channels
from portacnn.runtime import Array, backend_of

__all__ = ["Branches", "Recompute", "Residual", "Sequential"]


class _Container(Layer, abstract=True):
    """A layer whose constructor takes its children by name."""

    def _take(self, name: str, layer: Layer) -> None:
        """Make ``layer`` the child called ``name``."""
        if not isinstance(layer, Layer):
            raise ArgumentError(f"{name!r} must be a layer, got {layer!r}", type(self).__name__)
        if not name or "." in name:
            raise ArgumentError(
                f"a layer's name must not be empty or contain dots, got {name!r}",
                type(self).__name__,
            )
        if name in self.children:
            raise ArgumentError(f"there are two layers called {name!r}", type(self).__name__)
        Layer.adopt(self, name, layer)

    def _take_all(self, layers: Sequence[Layer], named: dict[str, Layer]) -> None:
        """Make all layers children. Layers without a name are called "0", "1", ..."""
        for name, layer in [*((str(i), layer) for i, layer in enumerate(layers)), *named.items()]:
            self._take(name, layer)
        self.children.sealed = True

    takes_children: ClassVar[bool]
    """Set by a class whose constructor takes its children by name. ``arguments`` then returns the
    current children."""

    def is_described_by_children(self) -> bool:
        kinds = (kind for kind in type(self).__mro__ if "__init__" in vars(kind))
        return "takes_children" in vars(next(kinds))

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        several, named = super().arguments()
        if not self.is_described_by_children():
            return several, named
        several = [self.children[str(number)] for number in range(len(several))]
        return several, {
            name: self.children[self.child_called(name)] if isinstance(value, Layer) else value
            for name, value in named.items()
        }

    def child_called(self, argument: str) -> str:
        """Return the name of the child that the constructor takes as ``argument``."""
        return argument


def _back(part: Layer, dy: Array, cache: Any, need_dx: bool) -> Array | None:
    """Run a child's backward pass if its dx or a parameter's gradient is needed."""
    return back(part, dy, cache, need_dx) if need_dx or learns(part) else None


class Sequential(_Container):
    """Layers that run one after the other: ``Sequential(conv1=Conv2d(1, 8, 3), relu1=ReLU())``.

    Layers without a name are called "0", "1", ..., as in torch.nn.Sequential. An empty
    ``Sequential()`` returns its input.
    """

    takes_children = True

    def __init__(self, *layers: Layer, **named: Layer) -> None:
        self._take_all(layers, named)
        self._set_stages()

    stages: tuple[Layer, ...]
    """The stages in order: layers, and fused layers."""
    inference_stages: tuple[Layer, ...]
    """The stages of a forward pass that is neither training nor keeps a cache."""

    def _set_stages(self) -> None:
        self.stages = tuple(stages(self.children))
        self.inference_stages = tuple(inference_stages(self.children))

    def adopt(self, name: str, layer: Layer) -> None:
        super().adopt(name, layer)
        self._set_stages()

    def infer(self, shape: Shape) -> Shape:
        for name, child in self.children.items():
            shape = child.plan(shape, self.child_path(name))
        return shape

    def _parts(self, inference: bool) -> list[Layer]:
        """Return the stages to run. Stages with hooks are split into their layers."""
        return [
            part
            for stage in (self.inference_stages if inference else self.stages)
            for part in (
                stage.layers if isinstance(stage, Fused) and stage.is_observed() else (stage,)
            )
        ]

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        trail, asked = Trail(), not keep or asks_dx(self)
        for part in self._parts(inference=not train and not keep):
            x, cache = run_part(part, x, train, keep, asked)
            asked = asked or learns(part)
            trail.append((part, cache))
        return x, trail if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        trail, grad = Trail.taken(cache, self.where), dy
        if not need_dx:  # the backward pass stops at the first part with trainable parameters
            del trail[: next((i for i, (part, _) in enumerate(trail) if learns(part)), len(trail))]
        with one_backward_pass():
            while trail:
                part, kept = trail.pop()
                grad = back(part, grad, kept, need_dx or bool(trail))
        return grad if need_dx else None

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        functions = []
        for stage in self.inference_stages:
            functions.append(stage.prepare(x))
            x = first_result(functions[-1], x)

        def run(x: Array) -> Array:
            for function in functions:
                x = function(x)
            return x

        backend = backend_of(x)
        return Prepared(lambda x: backend.run(run, x), x)

    def joined(self, parts: list[Array], bounds: Bounds) -> Array:
        layers, (x, residual) = _before_sum(self._parts(inference=True)), parts
        if not layers:
            return add_clip(parts, bounds)
        for part in layers[:-1]:
            x, _ = run(part, x, False, False)
        return run_joined(layers[-1], [x, residual], bounds)

    def prepare_joined(self, parts: list[Array], bounds: Bounds) -> Callable[[list[Array]], Array]:
        layers, (x, residual) = _before_sum(self.inference_stages), parts
        if not layers:
            return super().prepare_joined(parts, bounds)
        functions = []
        for stage in layers[:-1]:
            functions.append(stage.prepare(x))
            x = first_result(functions[-1], x)
        last = layers[-1].prepare_joined([x, residual], bounds)

        def run(parts: list[Array]) -> Array:
            x, residual = parts
            for function in functions:
                x = function(x)
            return last([x, residual])

        backend = backend_of(x)
        return Prepared(lambda parts: backend.run(run, parts), first_result(last, [x, residual]))


def _before_sum(parts: Sequence[Layer]) -> list[Layer]:
    """Return the parts without those at the end that return their input in inference, and that
    nobody observes. The last one may then add a residual."""
    kept = list(parts)
    while kept and returns_input(kept[-1]) and not is_observed(kept[-1]):
        kept.pop()
    return kept


class Residual(_Container):
    """y = activation(body(x) + shortcut(x)), the block of residual networks (He et al., 2015): x
    (N, *S) -> y (N, *OUT).

        Residual(
            Sequential(conv1=Conv2d(64, 128, 3, 2, 1), bn1=BatchNorm2d(128), relu=ReLU(),
            conv2=Conv2d(128, 128, 3, 1, 1)), Sequential(Conv2d(64, 128, 1, 2), BatchNorm2d(128)),
            activation=ReLU(),
        )

    The body adds no segment to the paths of its layers: a block at "layer1.0" has
    layer1.0.conv1.weight and, for the shortcut, layer1.0.downsample.0.weight, as in torchvision's
    ResNets.

    Args:
        body: any layer.
        shortcut: a layer with the body's output shape; None for the identity.
        activation: a layer applied to the sum, or None.
        shortcut_name: the shortcut's segment in paths.

    Raises:
        ArgumentError: an argument is not a layer; when the network is built, two layers have the
            same path.
        ShapeError: when the network is built, if body and shortcut return different shapes.
    """

    takes_children = True

    def __init__(
        self,
        body: Layer,
        shortcut: Layer | None = None,
        *,
        activation: Layer | None = None,
        shortcut_name: str = "downsample",
    ) -> None:
        self.shortcut_name = shortcut_name
        self._take("body", body)
        if shortcut is not None:
            self._take(shortcut_name, shortcut)
        if activation is not None:
            self._take("activation", activation)
        self.children.sealed = True

    @property
    def body(self) -> Layer:
        """Return the layer parallel to the shortcut."""
        return self.children["body"]

    @property
    def shortcut(self) -> Layer | None:
        """Return the shortcut's layer; None for the identity."""
        return self.children.get(self.shortcut_name)

    @property
    def activation(self) -> Layer | None:
        """Return the layer after the sum, or None."""
        return self.children.get("activation")

    def child_called(self, argument: str) -> str:
        return self.shortcut_name if argument == "shortcut" else argument

    def child_path(self, name: str) -> str:
        return self.path if name == "body" else super().child_path(name)

    def infer(self, shape: Shape) -> Shape:
        outputs = {
            name: child.plan(shape, self.child_path(name))
            for name, child in self._parallel().items()
        }
        body, short = outputs["body"], outputs.get(self.shortcut_name, shape)
        if body != short:
            given = "the input itself is" if self.shortcut is None else "the shortcut returns"
            raise ShapeError(
                f"the body returns {body}, {given} {short}; the shapes must be equal. "
                "Use a shortcut such as Conv2d(channels, out_channels, 1, stride)"
            )
        if self.activation is not None:
            body = self.activation.plan(body, self.child_path("activation"))
        self._check_paths()
        return body

    def _parallel(self) -> dict[str, Layer]:
        return {name: child for name, child in self.children.items() if name != "activation"}

    def _check_paths(self) -> None:
        """Raise ArgumentError if a layer of the body has the same path as the shortcut or the
        activation. The body adds no segment to paths."""
        taken = {layer.path for layer in self.body.walk()}
        for name in self.children:
            if name != "body" and self.child_path(name) in taken:
                raise ArgumentError(
                    f"the body already has a layer at {self.child_path(name)!r}; rename that "
                    "layer, pass another shortcut_name, or wrap the body in "
                    "Sequential(inner=...)"
                )

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        if not train and not keep:
            return self._inferred(x), None
        activation, shortcut, asked = self.activation, self.shortcut, asks_dx(self)
        y, of_body = run_part(self.body, x, train, keep, asked)
        short, of_shortcut = (
            (x, None) if shortcut is None else run_part(shortcut, x, train, keep, asked)
        )
        joined = type(activation) is ReLU and not is_observed(activation)
        try:
            y, last = add_relu([y, short], keep=keep) if joined else (add([y, short]), None)
        except PortacnnError as error:
            raise error.at(self.where)
        if activation is not None and not joined:
            y, last = run(activation, y, train, keep)
        if not keep:
            return y, None
        return y, Trail(
            [(shortcut, of_shortcut), (self.body, of_body), (None if joined else activation, last)]
        )

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        trail = Trail.taken(cache, self.where)
        with one_backward_pass():
            activation, kept = trail.pop()
            grad = dy
            if activation is not None:
                grad = back(activation, dy, kept)
            elif kept is not None:
                grad = add_relu_backward(dy, kept)
            body, kept = trail.pop()
            dx = _back(body, grad, kept, need_dx)
            shortcut, kept = trail.pop()
            short = grad if shortcut is None else _back(shortcut, grad, kept, need_dx)
        return add([dx, short]) if need_dx else None

    def _inferred(self, x: Array) -> Array:
        """Return the output in inference: the body's last convolution adds the shortcut and
        applies the activation, if possible."""
        shortcut, activation = self.shortcut, self.activation
        short = x if shortcut is None else run(shortcut, x, False, False)[0]
        bounds = bounds_of(activation)
        if bounds is None or (activation is not None and is_observed(activation)):
            bounds, after = Bounds(), activation
        else:
            after = None
        try:
            y = run_joined(self.body, [x, short], bounds)
        except PortacnnError as error:
            raise error.at(self.where)
        return y if after is None else run(after, y, False, False)[0]

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        shortcut, bounds = self.shortcut, bounds_of(self.activation)
        side = None if shortcut is None else shortcut.prepare(x)
        short = x if side is None else first_result(side, x)
        body = self.body.prepare_joined([x, short], bounds or Bounds())
        y = first_result(body, [x, short])
        after = (
            None if bounds is not None or self.activation is None else self.activation.prepare(y)
        )

        def run(x: Array) -> Array:
            y = body([x, x if side is None else side(x)])
            return y if after is None else after(y)

        return Prepared(run, y if after is None else first_result(after, y))


class Branches(_Container):
    """Parallel layers on the same input: x (N, *S) -> y, their outputs concatenated or added.

    An inception block (Szegedy et al., 2014) is

        Branches(
            Conv2d(192, 64, 1),
            Sequential(Conv2d(192, 96, 1), ReLU(), Conv2d(96, 128, 3, padding=1)),
            Sequential(MaxPool2d(3, 1, 1), Conv2d(192, 32, 1)),
        )

    and returns 64 + 128 + 32 channels. Branches without a name are called "0", "1", ... An empty
    ``Sequential()`` is the identity.

    Args:
        join: "concat": (N, C1, *S), (N, C2, *S), ... -> (N, C1 + C2 + ..., *S); "add": outputs of
            one shape, added.

    Raises:
        ArgumentError: there are no layers, or ``join`` is unknown.
        ShapeError: when the network is built, if the outputs cannot be joined.
    """

    takes_children = True

    def __init__(self, *layers: Layer, join: str = "concat", **named: Layer) -> None:
        try:
            self.join = one_of("join", join, "concat", "add")
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        if not layers and not named:
            raise ArgumentError("expected at least one layer", type(self).__name__)
        self._take_all(layers, named)

    def infer(self, shape: Shape) -> Shape:
        outputs = {
            name: child.plan(shape, self.child_path(name)) for name, child in self.children.items()
        }
        listed = ", ".join(f"{name} {output}" for name, output in outputs.items())
        first, *others = outputs.values()
        if self.join == "add":
            if any(output != first for output in others):
                raise ShapeError(f"expected branches of one shape to add, got {listed}")
            return first
        if not first or any(
            len(output) != len(first) or output[1:] != first[1:] for output in others
        ):
            raise ShapeError(
                f"branches that are concatenated may differ in their channels only, got {listed}"
            )
        return (sum(output[0] for output in outputs.values()), *first[1:])

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        trail, outputs, asked = Trail(), [], asks_dx(self)
        for child in self.children.values():
            y, cache = run_part(child, x, train, keep, asked)
            outputs.append(y)
            trail.append((child, (cache, y.shape[1]) if self.join == "concat" else (cache, 0)))
        try:
            joined = add(outputs) if self.join == "add" else concat_channels(outputs)
        except PortacnnError as error:
            raise error.at(self.where)
        return joined, trail if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        trail = Trail.taken(cache, self.where)
        try:
            channels = [count for _, (_, count) in trail]
            shares = [dy] * len(trail) if self.join == "add" else split_channels(dy, channels)
        except PortacnnError as error:
            raise error.at(self.where)
        grads = []
        with one_backward_pass():
            for share in shares:
                child, (kept, _) = trail.pop(0)
                grads.append(_back(child, share, kept, need_dx))
        return add(grads) if need_dx else None

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        functions = [child.prepare(x) for child in self.children.values()]
        join = add if self.join == "add" else concat_channels
        y = join([first_result(function, x) for function in functions])
        return Prepared(lambda x: join([function(x) for function in functions]), y)


class Recompute(_Container):
    """Gradient checkpointing: keep only the layer's input for the backward pass, and repeat the
    forward pass there: x -> layer(x).

        Sequential(*(Recompute(block) for block in blocks))  # keeps one block's activations

    This saves memory and costs a second forward pass (Chen et al., 2016). Outputs, gradients,
    running statistics and dropout masks are bit for bit the same as without it. It adds no segment
    to paths, so the same weight files load with and without it.

    Args:
        layer: any layer, usually a block of several.
    """

    takes_children = True

    def __init__(self, layer: Layer) -> None:
        self._take("layer", layer)
        self.children.sealed = True

    @property
    def layer(self) -> Layer:
        """Return the wrapped layer."""
        return self.children["layer"]

    def child_path(self, name: str) -> str:
        return self.path

    def infer(self, shape: Shape) -> Shape:
        return self.layer.plan(shape, self.path)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        layer, now = self.layer, moment()
        if now is None:
            before = Moment(None, 0, {inner: inner.step for inner in layer.walk()})
        else:
            before = Moment(now.step, now.first, now.counts)
        # with the same ``keep``, though the cache is dropped: other kernels return other bits
        y, _ = run(layer, x, train, keep)
        return y, Trail([(layer, (x, train, before))]) if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        layer, (x, train, before) = Trail.taken(cache, self.where).pop()
        with one_backward_pass():
            with recomputing(before):
                _, kept = run_part(layer, x, train, True, need_dx)
            return _back(layer, dy, kept, need_dx)

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        return self.layer.prepare(x)

    def joined(self, parts: list[Array], bounds: Bounds) -> Array:
        return run_joined(self.layer, parts, bounds)

    def prepare_joined(self, parts: list[Array], bounds: Bounds) -> Callable[[list[Array]], Array]:
        return self.layer.prepare_joined(parts, bounds)
