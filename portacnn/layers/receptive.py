"""Receptive fields: which pixels of the input a unit of a layer depends on, by the kernels alone.

On one axis, unit o of a layer reads the pixels from ``o*stride + low`` to ``o*stride + high``. A
layer maps that of its input to that of its output (``reach``): a convolution with kernel k, stride
s and padding p reads the cells from ``o*s - p`` to ``o*s - p + k - 1``. Parallel branches are
united.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import singledispatch
from math import ceil, floor, inf, lcm
from typing import NamedTuple

from portacnn.arguments import wholes
from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers.activation import Activation, PReLU
from portacnn.layers.base import Layer
from portacnn.layers.container import Branches, Recompute, Residual, Sequential
from portacnn.layers.conv import Conv, ConvTranspose
from portacnn.layers.dropout import Dropout
from portacnn.layers.graph import INPUT, Graph
from portacnn.layers.join import Arithmetic, ArithmeticWith, Concat, Join
from portacnn.layers.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LocalResponseNorm,
)
from portacnn.layers.pool import (
    AdaptiveAvgPool1d,
    AdaptiveAvgPool2d,
    AdaptiveAvgPool3d,
    AdaptiveMaxPool1d,
    AdaptiveMaxPool2d,
    AdaptiveMaxPool3d,
    AvgPool,
    GlobalAvgPool,
    GlobalMaxPool,
    MaxPool,
)
from portacnn.layers.resize import PixelShuffle, PixelUnshuffle, Upsample
from portacnn.layers.shape import Crop, Pad, Slice
from portacnn.ops.windows import pads_of

__all__ = ["ReceptiveField", "receptive_field"]


class Reach(NamedTuple):
    """On one axis, output o reads the inputs from ``o*stride + low`` to ``o*stride + high``."""

    stride: Fraction | float
    low: Fraction | float
    high: Fraction | float

    def after(self, before: "Reach") -> "Reach":
        """Return the reach into what ``before`` reads, for a layer that runs after it."""
        if inf in (self.high, before.high):
            return EVERYTHING
        return Reach(
            before.stride * self.stride,
            before.stride * self.low + before.low,
            before.stride * self.high + before.high,
        )


ITSELF = Reach(Fraction(1), Fraction(0), Fraction(0))
EVERYTHING = Reach(Fraction(0), -inf, inf)


@dataclass(frozen=True)
class ReceptiveField:
    """The receptive field of a layer's units, for each spatial axis of the input.

    Attributes:
        path: of the layer.
        size: its extent in pixels, padding included; of the whole image if each unit reads all.
        stride: the pixels between the fields of neighbouring units; 0 if each unit reads all. It
            is below 1 behind an upsampling.
        offset: the first pixel that unit 0 reads; negative within the padding.
        image: the extent of the input.
        units: the extent of the layer's output; () if it has no spatial axes.
    """

    path: str
    size: tuple[int, ...]
    stride: tuple[float, ...]
    offset: tuple[int, ...]
    image: tuple[int, ...]
    units: tuple[int, ...]
    reaches: tuple[Reach, ...]

    def pixels(self, unit: Sequence[int] = ()) -> tuple[tuple[int, int], ...]:
        """Return the pixels that a unit reads on each axis, (first, last + 1), within the image.

        Args:
            unit: its index on each spatial axis. () takes the middle one.

        Raises:
            ArgumentError: if there is no such unit.
        """
        chosen = wholes("unit", unit, 0) if unit else tuple(extent // 2 for extent in self.units)
        if len(chosen) != len(self.units) or any(
            o >= n for o, n in zip(chosen, self.units, strict=True)
        ):
            raise ArgumentError(
                f"{self.path} has units {self.units} on its spatial axes, got {tuple(unit)}"
            )
        places = chosen or (0,) * len(self.image)
        return tuple(
            (0, extent) if reach.high == inf else _within(o, reach, extent)
            for o, reach, extent in zip(places, self.reaches, self.image, strict=True)
        )


def receptive_field(network: Layer, path: str) -> ReceptiveField:
    """Return the receptive field of a layer's units.

        >>> from portacnn.layers import Conv2d, MaxPool2d, Sequential
        >>> net = Sequential(conv=Conv2d(1, 4, 5, padding=2), pool=MaxPool2d(2))
        >>> field = receptive_field(net.build((1, 28, 28), device="cpu"), "pool")
        >>> field.size, field.stride, field.offset, field.pixels((0, 3))
        ((6, 6), (2, 2), (-2, -2), ((0, 4), (4, 10)))

    It follows from kernels, strides, padding and dilation; weights do not count. It is an upper
    bound: behind an upsampling it may be a pixel too large, and at the image's border it holds
    pixels that only padding cells of an inner layer would have read. Branches with different
    strides read the whole image.

    Args:
        network: built.
        path: of a layer below it, as in ``summary``. Of a layer in several places, the first.

    Raises:
        StateError: the network is not built.
        ArgumentError: there is no layer at this path, or a layer before it is of a class whose
            reach is not known (``portacnn.layers.receptive.reach.register`` adds it).
        ShapeError: samples have no spatial axes.
    """
    network.check_built()
    layer, image = network.layer_at(path), network.input_shape[1:]
    if not image:
        raise ShapeError(f"samples {network.input_shape} have no spatial axes", network.where)
    found: dict[str, tuple[Reach, ...]] = {}
    _through(network, (ITSELF,) * len(image), network.path, found)
    if layer.path not in found:
        raise ArgumentError("the layer around it does not run it as a layer", layer.where)
    field = ReceptiveField(path, (), (), (), image, (), found[layer.path])
    units = layer.output_shape[1:]
    return replace(
        field,
        size=tuple(
            extent if reach.high == inf else floor(reach.high - reach.low) + 1
            for reach, extent in zip(field.reaches, image, strict=True)
        ),
        stride=tuple(
            int(reach.stride) if reach.stride == int(reach.stride) else float(reach.stride)
            for reach in field.reaches
        ),
        offset=tuple(0 if reach.high == inf else ceil(reach.low) for reach in field.reaches),
        units=units if len(units) == len(image) else (),
    )


def _within(unit: int, reach: Reach, extent: int) -> tuple[int, int]:
    first = max(ceil(unit * reach.stride + reach.low), 0)
    return min(first, extent), max(min(floor(unit * reach.stride + reach.high) + 1, extent), 0)


# --- the tree -------------------------------------------------------------------------------------

Field = tuple[Reach, ...]


def _through(layer: Layer, field: Field, path: str, found: dict[str, Field]) -> Field:
    """Return the field behind a layer; note that of each layer inside it, by path."""
    if isinstance(layer, Graph):
        after = _through_graph(layer, field, found)
    elif isinstance(layer, Residual | Branches):
        activation = layer.activation if isinstance(layer, Residual) else None
        ways = [field] if isinstance(layer, Residual) and layer.shortcut is None else []
        for name, child in layer.children.items():
            if child is not activation:
                ways.append(_through(child, field, layer.child_path(name), found))
        after = _united(ways)
        if activation is not None:
            found.setdefault(activation.path, after)
    elif isinstance(layer, Sequential | Recompute):
        after = field
        for name, child in layer.children.items():
            after = _through(child, after, layer.child_path(name), found)
    else:
        after = tuple(
            each.after(before)
            for each, before in zip(_reaches(layer, len(field)), field, strict=True)
        )
    found.setdefault(path, after)
    return after


def _through_graph(graph: Graph, field: Field, found: dict[str, Field]) -> Field:
    values = {INPUT: field}
    for name, layer, inputs in graph.nodes:
        united = _united([values[i] for i in inputs])
        values[name] = _through(layer, united, graph.child_path(name), found)
    return values[graph.nodes[-1].name]


def _united(ways: Sequence[Field]) -> Field:
    """Return the smallest field that holds all of them; the whole image if their strides differ."""
    return tuple(
        Reach(each[0].stride, min(r.low for r in each), max(r.high for r in each))
        if len({r.stride for r in each}) == 1
        else EVERYTHING
        for each in zip(*ways, strict=True)
    )


def _reaches(layer: Layer, axes: int) -> Field:
    """Return the reach of a layer without inner layers on each axis."""
    maps = len(layer.output_shape) == axes + 1
    if not isinstance(layer, Join):
        maps &= len(layer.input_shape) == axes + 1
    return reach(layer) if maps else (EVERYTHING,) * axes


@singledispatch
def reach(layer: Layer) -> Field:
    """Return the ``Reach`` of a layer on each of its spatial axes.

    For a layer class that you wrote:
    ``reach.register(MyLayer, pointwise)``, or a function that returns ``Reach(stride, low, high)``
    for each axis.
    """
    raise ArgumentError(
        "its receptive field is not known; register the class with "
        "portacnn.layers.receptive.reach.register",
        layer.where,
    )


def pointwise(layer: Layer) -> Field:
    """Return the reach of a layer whose every output reads the cell at its own place."""
    return (ITSELF,) * (len(layer.output_shape) - 1)


def all_cells(layer: Layer) -> Field:
    """Return the reach of a layer whose every output reads all cells."""
    return (EVERYTHING,) * (len(layer.output_shape) - 1)


for _kind in (
    *(Activation, PReLU, Dropout, Arithmetic, ArithmeticWith, Concat, LocalResponseNorm),
    *(BatchNorm1d, BatchNorm2d, BatchNorm3d),
):
    reach.register(_kind, pointwise)
for _whole in (
    *(GlobalAvgPool, GlobalMaxPool, GroupNorm, LayerNorm),
    *(InstanceNorm1d, InstanceNorm2d, InstanceNorm3d),
):
    reach.register(_whole, all_cells)


@reach.register(Conv)
@reach.register(MaxPool)
@reach.register(AvgPool)
def _of_windows(layer: Conv | MaxPool | AvgPool) -> Field:
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    pads = pads_of(layer.padding, layer.input_shape[1:], kernel, stride, dilation)
    if getattr(layer, "padding_mode", "zeros") in ("reflect", "circular"):
        return (EVERYTHING,) * len(kernel)  # the padding holds pixels from elsewhere
    return tuple(
        Reach(Fraction(s), Fraction(-before), Fraction((k - 1) * d - before))
        for k, s, d, (before, _) in zip(kernel, stride, dilation, pads, strict=True)
    )


@reach.register
def _of_transposed(layer: ConvTranspose) -> Field:
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    pads = pads_of(layer.padding, layer.input_shape[1:], kernel, stride, dilation)
    return tuple(
        Reach(Fraction(1, s), Fraction(before - (k - 1) * d, s), Fraction(before, s))
        for k, s, d, (before, _) in zip(kernel, stride, dilation, pads, strict=True)
    )


@reach.register
def _of_upsampling(layer: Upsample) -> Field:
    found = []
    for _, _, start, step, rounding in layer.axes(layer.input_shape):
        below = above = Fraction(1)  # linear: the cells beside start + o * step
        if rounding is not None:
            parts = lcm(start.denominator, step.denominator)
            most = Fraction(parts - 1, parts)
            below = {"floor": most, "ceil": Fraction(0)}.get(rounding, Fraction(1, 2))
            above = {"floor": Fraction(0), "ceil": most}.get(rounding, Fraction(1, 2))
        found.append(Reach(step, start - below, start + above))
    return tuple(found)


@reach.register(AdaptiveAvgPool1d)
@reach.register(AdaptiveAvgPool2d)
@reach.register(AdaptiveAvgPool3d)
@reach.register(AdaptiveMaxPool1d)
@reach.register(AdaptiveMaxPool2d)
@reach.register(AdaptiveMaxPool3d)
def _of_shares(layer: Layer) -> Field:
    return tuple(  # from floor(o*n/m) to ceil((o + 1)*n/m) - 1
        Reach(Fraction(n, m), Fraction(1 - m, m), Fraction(n - 1, m))
        for n, m in zip(layer.input_shape[1:], layer.output_shape[1:], strict=True)
    )


@reach.register
def _of_shuffling(layer: PixelShuffle) -> Field:
    r = layer.upscale_factor
    return (Reach(Fraction(1, r), Fraction(1 - r, r), Fraction(0)),) * (len(layer.input_shape) - 1)


@reach.register
def _of_unshuffling(layer: PixelUnshuffle) -> Field:
    r = layer.downscale_factor
    return (Reach(Fraction(r), Fraction(0), Fraction(r - 1)),) * (len(layer.input_shape) - 1)


@reach.register
def _of_crop(layer: Crop) -> Field:
    starts = (kept.start or 0 for kept in layer.kept_of(layer.input_shape[1:]))
    return tuple(Reach(Fraction(1), Fraction(start), Fraction(start)) for start in starts)


@reach.register
def _of_padding(layer: Pad) -> Field:
    if layer.mode in ("reflect", "circular"):
        return (EVERYTHING,) * len(layer.pads[1:])
    return tuple(Reach(Fraction(1), Fraction(-a), Fraction(-a)) for a, _ in layer.pads[1:])


@reach.register
def _of_slice(layer: Slice) -> Field:
    return tuple(
        Reach(Fraction(step), Fraction(start), Fraction(start))
        for start, step in zip(layer.starts[1:], layer.steps[1:], strict=True)
    )
