"""The stages of a ``Sequential``: layers, and consecutive layers fused to one op.

A *stage* is a layer or a ``Fused``: several layers that run as one fused op
(``portacnn.ops.fused``). Fused layers keep their own paths and parameters. Each subclass of
``Fused`` lists the classes of its layers in ``kinds``. Subclasses of those classes are not fused,
because they may override the computation.

Inference has stages of its own (``inference_stages``), in which a ``ConvUnit`` is a convolution
with the batch norm, the activation and the max pooling after it. It has no backward pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from portacnn.layers import units
from portacnn.layers.activation import Clip, ReLU
from portacnn.layers.base import Layer
from portacnn.layers.conv import Conv1d, Conv2d, Conv3d
from portacnn.layers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d, StochasticDepth
from portacnn.layers.limits import count_layer
from portacnn.layers.linear import Linear
from portacnn.layers.norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from portacnn.layers.pool import MaxPool1d, MaxPool2d, MaxPool3d
from portacnn.layers.running import is_observed
from portacnn.ops.conv import conv_windows
from portacnn.ops.fused import (
    RELU,
    Bounds,
    batch_norm_relu,
    batch_norm_relu_backward,
    conv_relu,
    conv_relu_backward,
    conv_unit,
    linear_relu,
    linear_relu_backward,
)
from portacnn.ops.pool import pool_windows
from portacnn.runtime import Array

Kinds = tuple[type[Layer], ...]
_LONGEST = 4  # layers that run as one op


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


# --- inference ------------------------------------------------------------------------------------

_AFTER: dict[type[Layer], tuple[type[Layer], type[Layer]]] = {
    Conv1d: (BatchNorm1d, MaxPool1d),
    Conv2d: (BatchNorm2d, MaxPool2d),
    Conv3d: (BatchNorm3d, MaxPool3d),
}
_UNCHANGED = frozenset({Dropout, Dropout1d, Dropout2d, Dropout3d, StochasticDepth})


def bounds_of(layer: Layer | None) -> Bounds | None:
    """Return the limits of an activation, which None does not have; None for any other layer."""
    if type(layer) is Clip:
        low, high = (None if limit is None else float(limit) for limit in (layer.min, layer.max))
        return Bounds(low, high)
    return Bounds() if layer is None else RELU if type(layer) is ReLU else None


def returns_input(layer: Layer) -> bool:
    """Return whether the layer returns its input in inference: dropout."""
    return type(layer) in _UNCHANGED and layer.is_built()


class ConvUnit(Fused):
    """A convolution, batch norm with running statistics, ReLU or ``Clip``, and max pooling, in this
    order, in inference. All but the convolution are optional."""

    kinds = ()

    def __init__(self, layers: Mapping[str, Layer]) -> None:
        super().__init__(layers)
        conv, *others = self.layers
        norm, pool = _AFTER[type(conv)]
        self._norm = next((layer for layer in others if type(layer) is norm), None)
        self._pool = next((layer for layer in others if type(layer) is pool), None)
        self._activation = next((layer for layer in others if bounds_of(layer) is not None), None)

    @staticmethod
    def count(layers: Sequence[Layer]) -> int:
        """Return how many of the layers, from the first on, one unit computes; 0 for none."""
        first: Any = layers[0]
        if type(first) not in _AFTER or first.padding_mode != "zeros":
            return 0
        norm, pool = _AFTER[type(first)]
        fits: tuple[Callable[[Any], bool], ...] = (
            lambda layer: type(layer) is norm and layer.track_running_stats,
            lambda layer: bounds_of(layer) is not None,
            lambda layer: type(layer) is pool,
        )
        count = 1
        for fit in fits:
            count += count < len(layers) and bool(fit(layers[count]))
        return count

    @staticmethod
    def adds(layers: Sequence[Layer]) -> bool:
        """Return whether these are a convolution, and optionally a batch norm: a unit that may add
        a residual."""
        return 0 < ConvUnit.count(layers) == len(layers) <= 2 and (
            len(layers) == 1 or type(layers[1]) is _AFTER[type(layers[0])][0]
        )

    def unit(self, x: Array, bounds: Bounds | None = None) -> units.Unit | None:
        """Return the arguments of ``conv_unit``, see ``Conv.unit``. With ``bounds``, those after a
        residual sum, it is None if the unit ends with an activation or pooling."""
        if bounds is None:
            bounds = bounds_of(self._activation)
        elif self._activation is not None or self._pool is not None:
            return None
        norm: Any = self._norm
        pool: Any = self._pool
        return self.layers[0].unit(
            x, bounds, None if norm is None else norm.after_conv(), pool and pool.geometry()
        )

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return conv_unit([x], *(self.unit(x) or ())), None  # never None without bounds

    prepare, joined, prepare_joined = units.prepare, units.joined, units.prepare_joined


# --- the stages of a sequence ---------------------------------------------------------------------


def stages(layers: Mapping[str, Layer]) -> Iterator[Layer]:
    """Yield the stages in order. The longest matching ``Fused`` is preferred."""
    return _staged(layers, _fused)


def inference_stages(layers: Mapping[str, Layer]) -> Iterator[Layer]:
    """Yield the stages of inference in order."""
    return _staged(layers, lambda some: _unit(some) or _fused(some))


def _staged(
    layers: Mapping[str, Layer], find: Callable[[dict[str, Layer]], Fused | None]
) -> Iterator[Layer]:
    names, at = list(layers), 0
    while at < len(names):
        found = find({name: layers[name] for name in names[at : at + _LONGEST]})
        yield layers[names[at]] if found is None else found
        at += 1 if found is None else len(found.layers)


def _fused(layers: dict[str, Layer]) -> Fused | None:
    """Return the first of these layers fused with the ones after it; None if they do not match."""
    for count in (3, 2):
        taken = dict(islice(layers.items(), count))
        kind = Fused.table.get(tuple(map(type, taken.values())))
        if kind is not None and kind.takes(next(iter(taken.values()))):
            return kind(taken)
    return None


def _unit(layers: dict[str, Layer]) -> Fused | None:
    """Return the first of these layers and the ones after it as a unit; None for a convolution
    alone, which is one by itself."""
    count = ConvUnit.count(list(layers.values()))
    return ConvUnit(dict(islice(layers.items(), count))) if count > 1 else None
