"""The stages of a ``Sequential``: layers, and consecutive layers fused to one op.

A *stage* is a layer or a ``Fused``: several layers that run as one fused op
(``portacnn.ops.fused``). Fused layers keep their own paths and parameters. Each subclass of
``Fused`` lists the classes of its layers in ``kinds``. Subclasses of those classes are not fused,
because they may override the computation.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from portacnn.layers.activation import ReLU
from portacnn.layers.base import Layer
from portacnn.layers.conv import Conv1d, Conv2d, Conv3d
from portacnn.layers.limits import count_layer
from portacnn.layers.linear import Linear
from portacnn.layers.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from portacnn.layers.pool import MaxPool1d, MaxPool2d, MaxPool3d
from portacnn.layers.running import is_observed
from portacnn.ops.conv import conv_windows
from portacnn.ops.fused import (
    batch_norm_relu,
    batch_norm_relu_backward,
    conv_relu,
    conv_relu_backward,
    linear_relu,
    linear_relu_backward,
)
from portacnn.ops.pool import pool_windows
from portacnn.runtime import Array

Kinds = tuple[type[Layer], ...]


class Fused(Layer, abstract=True):
    """Layers that run as one op. It refers to the layers and is not part of the network's tree.

    Attributes:
        kinds: the classes of the layers, in order.
        layers: the layers. The first one has the parameters.
    """

    kinds: ClassVar[tuple[Kinds, ...]]
    op: ClassVar[Any]
    op_backward: ClassVar[Any]
    table: ClassVar[dict[Kinds, type["Fused"]]] = {}

    def __init_subclass__(cls, *, abstract: bool = True) -> None:
        super().__init_subclass__(abstract=abstract)
        Fused.table |= dict.fromkeys(cls.kinds, cls)

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        count_layer(-1)  # its layers are counted already
        self.name = " + ".join(layers)
        self.layers: tuple[Any, ...] = tuple(layers.values())

    @classmethod
    def takes(cls, first: Any) -> bool:
        """Return whether the fused op supports the options of this first layer."""
        return True

    @property
    def where(self) -> str:
        """Return the first layer's path and class, for error messages."""
        return self.layers[0].where

    def walk(self) -> Iterator[Layer]:
        """Yield the fused layers, see ``Layer.walk``."""
        yield from self.layers

    def is_observed(self) -> bool:
        """Return whether one of the layers has hooks."""
        return any(is_observed(layer) for layer in self.layers)

    def op_arguments(self, x: Array) -> tuple[Any, ...]:
        """Return the op's arguments after x."""
        raise NotImplementedError

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return type(self).op(x, *self.op_arguments(x), keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        first = self.layers[0]
        dx, dweight, dbias = type(self).op_backward(
            dy, cache, need_dx=need_dx, **first.frozen_grads()
        )
        first.add_grads(weight=dweight, bias=dbias)
        return dx

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        return type(self).op.prepare(x, *self.op_arguments(x))


class FusedConv(Fused):
    """A convolution, ReLU, and optionally max pooling."""

    kinds = (
        *(
            (conv, ReLU, pool)
            for conv, pool in ((Conv1d, MaxPool1d), (Conv2d, MaxPool2d), (Conv3d, MaxPool3d))
        ),
        *((conv, ReLU) for conv in (Conv1d, Conv2d, Conv3d)),
    )
    op, op_backward = conv_relu, conv_relu_backward

    @classmethod
    def takes(cls, first: Any) -> bool:
        return bool(first.padding_mode == "zeros")

    def op_arguments(self, x: Array) -> tuple[Any, ...]:
        conv, _, *pools = self.layers
        conv.check_built()
        weight, bias = conv.params["weight"], conv.params.get("bias")
        windows = conv_windows(conv.axes, x, weight, bias, **conv.geometry())
        pool = pool_windows(windows.out, **pools[0].geometry()) if pools else None
        return weight, bias, windows, conv.groups, pool


class FusedLinear(Fused):
    """A linear layer and ReLU."""

    kinds = ((Linear, ReLU),)
    op, op_backward = linear_relu, linear_relu_backward

    def op_arguments(self, x: Array) -> tuple[Any, ...]:
        linear = self.layers[0]
        linear.check_built()
        return linear.params["weight"], linear.params.get("bias")


class FusedBatchNorm(Fused):
    """Batch norm and ReLU."""

    kinds = tuple((norm, ReLU) for norm in (BatchNorm1d, BatchNorm2d, BatchNorm3d))
    op, op_backward = batch_norm_relu, batch_norm_relu_backward

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return self.layers[0].run(batch_norm_relu, x, train, keep)

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        return Layer.prepare(self, x)


def stages(layers: Mapping[str, Layer]) -> Iterator[Layer]:
    """Yield the stages in order. The longest matching ``Fused`` is preferred."""
    names, at = list(layers), 0
    while at < len(names):
        first = layers[names[at]]
        stage, length = first, 1
        for count in (3, 2):
            taken = {name: layers[name] for name in names[at : at + count]}
            fused = Fused.table.get(tuple(map(type, taken.values())))
            if fused is not None and fused.takes(first):
                stage, length = fused(taken), len(taken)
                break
        yield stage
        at += length
