"""Simulated quantization: layers that round values to those that a few integers can represent.

The integers are stored as floating point. With a scale s and a zero point z, x becomes
q = round(x / s) + z, limited to the integers of a dtype, and again x = (q - z) * s. The backward
pass takes the rounding for an identity (the straight-through estimator): the gradient passes where
q was not limited, and is 0 elsewhere.
"""

from typing import Any

from portacnn.arguments import one_of, whole
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.runtime import Array, backend_of, where

__all__ = ["Dequantize", "Quantize"]

RANGES = {
    "int8": (-128.0, 127.0),
    "uint8": (0.0, 255.0),
    "int16": (-32768.0, 32767.0),
    "uint16": (0.0, 65535.0),
}
"""The smallest and largest integer of each dtype."""


class _Quantized(Layer, abstract=True):
    """Base class: the scale and the zero point.

    Args:
        dtype: of the integers: "int8", "uint8", "int16" or "uint16".
        axis: the axis with a scale for each index, 1 or more; None for one scale.

    Buffers: ``scale``, ``zero_point``: (n,), the length of the axis; () for one scale.
    """

    def __init__(self, dtype: str = "int8", axis: int | None = None) -> None:
        try:
            self.integers = one_of("dtype", dtype, *RANGES)
            self.axis = None if axis is None else whole("axis", axis, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        if self.axis is not None and self.axis > len(shape):
            raise ShapeError(f"axis {self.axis} is out of range for a batch of samples {shape}")
        count = () if self.axis is None else (shape[self.axis - 1],)
        self.declare_buffer("scale", count, 1.0)
        self.declare_buffer("zero_point", count, 0.0)
        return shape

    def _scales(self, x: Array) -> tuple[Array, Array]:
        """Return scale and zero point, broadcast against x."""
        self.check_built()
        scale, zero = self.buffers["scale"], self.buffers["zero_point"]
        if self.axis is None:
            return scale, zero
        xp, shape = backend_of(x).xp, (-1, *(1,) * (x.ndim - 1 - self.axis))
        return xp.reshape(scale, shape), xp.reshape(zero, shape)


class Quantize(_Quantized):
    """x (N, *S) -> the integers round(x / scale) + zero_point, within the range of ``dtype``, as
    floating point. Halves are rounded to even, as ONNX's QuantizeLinear does."""

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        xp, (scale, zero) = backend_of(x).xp, self._scales(x)
        least, most = RANGES[self.integers]
        with where(x):
            q = xp.round(x / scale) + zero
            y = xp.clip(q, least, most)
            return y, q == y if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        inside, (scale, _) = self.kept(cache), self._scales(dy)
        with where(dy):
            dx = dy / scale
            return backend_of(dy).xp.where(inside, dx, 0.0 * dx)


class Dequantize(_Quantized):
    """Integers (N, *S), as floating point -> (x - zero_point) * scale."""

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        scale, zero = self._scales(x)
        with where(x):
            return (x - zero) * scale, keep or None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        self.kept(cache)
        with where(dy):
            return dy * self._scales(dy)[0]
