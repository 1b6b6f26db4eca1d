"""Containers: layers made of layers."""

from portacnn.errors import ArgumentError, PortacnnError
from portacnn.layers.base import Layer, Shape
from portacnn.runtime import Array, describe


class Sequential(Layer):
    """Layers that run one after the other: ``Sequential(conv1=Conv2d(1, 8, 3), relu1=ReLU())``.

    Layers given without a name are called "0", "1", ..., as in torch.nn.Sequential.
    """

    def __init__(self, *layers: Layer, **named: Layer) -> None:
        for name, layer in [*((str(i), layer) for i, layer in enumerate(layers)), *named.items()]:
            if not isinstance(layer, Layer):
                raise ArgumentError(f"{name!r} is no layer: {layer!r}", type(self).__name__)
            if name in self.children:
                raise ArgumentError(f"there are two layers called {name!r}", type(self).__name__)
            present = {id(inner) for child in self.children.values() for inner in child.walk()}
            if any(id(inner) in present for inner in layer.walk()):
                raise ArgumentError(f"{name!r} is in this network already; give each place a layer of its own")
            self.children[name] = layer

    def infer(self, shape: Shape) -> Shape:
        for name, child in self.children.items():
            shape = child.plan(shape, self.child_path(name))
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        keep = train if keep is None else keep
        for child in self.children.values():
            try:
                x = child.forward(x, train=train, keep=keep)
            except PortacnnError as error:
                raise _located(error, child, x)
        return x

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        layers = list(self.children.values())
        first = 0 if need_dx else _first_with_params(layers)
        grad: Array | None = dy
        for index in range(len(layers) - 1, first - 1, -1):
            grad = layers[index].backward(grad, need_dx=need_dx or index > first)
        for layer in layers[:first]:
            layer.forget()
        return grad if need_dx else None


def _first_with_params(layers: list[Layer]) -> int:
    """The first layer that learns anything: without a wish for dx, the backward pass ends there."""
    for index, layer in enumerate(layers):
        if any(inner.params for inner in layer.walk()):
            return index
    return len(layers)


def _located(error: PortacnnError, layer: Layer, x: Array) -> PortacnnError:
    """The error, with the path of the layer that it happened in and what that was given."""
    if not layer.children:
        error.at(layer.where, over=True)
        if "input " not in error.message:
            error.message += f" (input {describe(x)})"
    return error
