"""Inference of a convolution, and of the layers and the sum that follow it, as one op:
``ops.fused.conv_unit``.

A layer that runs so has a method ``unit(x, bounds)``, which returns the op's arguments, and takes
``prepare``, ``joined`` and ``prepare_joined`` from here.
"""

from collections.abc import Callable
from typing import Any

from portacnn.layers.base import Layer
from portacnn.layers.running import apart
from portacnn.ops.fused import Bounds, conv_unit
from portacnn.runtime import Array

Unit = tuple[Any, ...]
"""The arguments of ``conv_unit`` after ``parts``: weight, bias, windows, ..."""


def prepare(layer: Any, x: Array) -> Callable[[Array], Array]:
    """See ``Layer.prepare``."""
    unit = layer.unit(x)
    if unit is None:
        return Layer.prepare(layer, x)
    function = conv_unit.prepare([x], *unit)
    return lambda x: function([x])


def joined(layer: Any, parts: list[Array], bounds: Bounds) -> Array:
    """See ``Layer.joined``."""
    unit = layer.unit(parts[0], bounds)
    return conv_unit(parts, *unit) if takes(unit, parts) else apart(layer, parts, bounds)


def prepare_joined(
    layer: Any, parts: list[Array], bounds: Bounds
) -> Callable[[list[Array]], Array]:
    """See ``Layer.prepare_joined``."""
    unit = layer.unit(parts[0], bounds)
    if takes(unit, parts):
        return conv_unit.prepare(parts, *unit)
    return Layer.prepare_joined(layer, parts, bounds)


def takes(unit: Unit | None, parts: list[Array]) -> bool:
    """Return whether the op adds this residual: it has the shape of the convolution's output."""
    if unit is None:
        return False
    x, residual = parts
    return tuple(residual.shape) == (x.shape[0], unit[0].shape[0], *unit[2].out)
