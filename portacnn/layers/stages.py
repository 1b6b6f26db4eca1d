"""What a ``Sequential`` runs: its layers, of which some that follow each other are one op together.

A *stage* is a layer, or several for which there is an op that does it all (``portacnn.ops.fused``). Those keep their own paths
and parameters; only the way through them is shorter. A class that derives from a layer may do something else, so only
the very classes named here are put together; and a layer that is observed runs by itself.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

from portacnn.layers.activation import ReLU
from portacnn.layers.base import Layer
from portacnn.layers.conv import Conv1d, Conv2d, Conv3d
from portacnn.layers.linear import Linear
from portacnn.layers.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from portacnn.layers.pool import MaxPool1d, MaxPool2d, MaxPool3d
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

_POOL: dict[type[Layer], type[Layer]] = {Conv1d: MaxPool1d, Conv2d: MaxPool2d, Conv3d: MaxPool3d}


_BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


class Fused:
    """Layers that run as one op. The first of them has the parameters, and keeps the op's cache."""

    op: ClassVar[Any]
    op_backward: ClassVar[Any]
    children: ClassVar[dict[str, Layer]] = {}

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        self.name = " + ".join(layers)
        self.layers: list[Any] = list(layers.values())

    @property
    def where(self) -> str:
        """What the first of them says, for error messages."""
        return self.layers[0].where

    def walk(self) -> Iterator[Layer]:
        """See ``Layer.walk``."""
        yield from self.layers

    def forget(self) -> None:
        """See ``Layer.forget``."""
        self.layers[0].forget()

    def _arguments(self, x: Array) -> tuple[Any, ...]:
        """What the op takes after x."""
        raise NotImplementedError

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        y, cache = type(self).op(x, *self._arguments(x), keep=train if keep is None else keep)
        self.layers[0]._keep(cache)
        return y

    def backward(self, dy: Array, *, need_dx: bool = True) -> Array | None:
        first = self.layers[0]
        dx, dweight, dbias = type(self).op_backward(dy, first._kept(), need_dx=need_dx)
        first._write_grads(weight=dweight, bias=dbias)
        return dx

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        """See ``Layer.prepare``."""
        return type(self).op.prepare(x, *self._arguments(x))


class FusedConv(Fused):
    """A convolution, ReLU, and max pooling if there are three."""

    op, op_backward = conv_relu, conv_relu_backward

    def _arguments(self, x: Array) -> tuple[Any, ...]:
        conv, _, *pools = self.layers
        conv._home()
        weight, bias = conv.params["weight"], conv.params.get("bias")
        windows = conv_windows(conv.axes, x, weight, bias, **conv.geometry())
        pool = pool_windows(windows.out, **pools[0].geometry()) if pools else None
        return weight, bias, windows, conv.groups, pool


class FusedLinear(Fused):
    """An affine map and ReLU."""

    op, op_backward = linear_relu, linear_relu_backward

    def _arguments(self, x: Array) -> tuple[Any, ...]:
        linear = self.layers[0]
        linear._home()
        return linear.params["weight"], linear.params.get("bias")


class FusedBatchNorm(Fused):
    """Batch norm and ReLU."""

    op, op_backward = batch_norm_relu, batch_norm_relu_backward

    def forward(self, x: Array, *, train: bool = False, keep: bool | None = None) -> Array:
        return self.layers[0].run(batch_norm_relu, x, train, keep)

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        return lambda x: self.forward(x, keep=False)


Stage = Layer | Fused


def observed(layer: Layer) -> bool:
    """Whether somebody has put a function of their own over this very layer's forward or backward, to see what goes through."""
    return "forward" in vars(layer) or "backward" in vars(layer)


def stages(layers: Mapping[str, Layer]) -> Iterator[Stage]:
    """The layers in their order, those together that may be."""
    names, at = list(layers), 0
    while at < len(names):
        first = layers[names[at]]
        length, fused = _match([type(layers[name]) for name in names[at : at + 3]], first)
        yield fused({name: layers[name] for name in names[at : at + length]}) if fused else first
        at += length


def _match(kinds: list[type[Layer]], first: Any) -> tuple[int, type[Fused] | None]:
    """How many of these layers are one stage, and which kind of fused one, if any."""
    if len(kinds) < 2 or kinds[1] is not ReLU:
        return 1, None
    if kinds[0] is Linear:
        return 2, FusedLinear
    if kinds[0] in _BATCH_NORMS:
        return 2, FusedBatchNorm
    if kinds[0] in _POOL and first.padding_mode == "zeros":
        return (3, FusedConv) if kinds[2:] == [_POOL[kinds[0]]] else (2, FusedConv)
    return 1, None
