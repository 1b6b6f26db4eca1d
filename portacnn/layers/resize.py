"""Layers that change the image size: interpolation, pixel shuffle and pixel unshuffle.

Notation: C channels, H/W input, S/OUT the spatial axes in/out, r a factor.
"""

from collections.abc import Sequence
from typing import Any

from portacnn import ops
from portacnn.arguments import whole
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.layers.limits import count_taps
from portacnn.ops.pixel_shuffle import check_shuffle, check_unshuffle
from portacnn.ops.resize import Axis, axes_of, check_interpolation
from portacnn.runtime import Array

__all__ = ["PixelShuffle", "PixelUnshuffle", "Upsample"]


class Upsample(Layer):
    """Resize images by interpolation, up or down: x (N, C, *S) -> y (N, C, *OUT), as
    torch.nn.Upsample.

        Upsample(scale_factor=2, mode="bilinear")  # (C, H, W) -> (C, 2H, 2W)

    Args:
        size, scale_factor, mode, align_corners, coordinates, rounding: as for
            ``portacnn.ops.interpolate``.

    Raises:
        ArgumentError: as ``portacnn.ops.interpolate``.
        ShapeError: when the network is built, if the mode does not support the number of axes or
            the output is empty.
    """

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        scale_factor: float | Sequence[float] | None = None,
        mode: str = "nearest",
        align_corners: bool = False,
        coordinates: str | None = None,
        rounding: str | None = None,
    ) -> None:
        try:
            check_interpolation(size, scale_factor, mode, align_corners, coordinates, rounding)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.size, self.scale_factor = size, scale_factor
        self.mode, self.align_corners = mode, bool(align_corners)
        self.coordinates, self.rounding = coordinates, rounding

    def axes(self, shape: Shape) -> tuple[Axis, ...]:
        """Return how each spatial axis of a sample (C, *S) is interpolated."""
        options = (self.mode, self.align_corners, self.coordinates, self.rounding)
        return axes_of(shape[1:], self.size, self.scale_factor, *options)

    def infer(self, shape: Shape) -> Shape:
        if not 2 <= len(shape) <= 4:
            raise ShapeError(f"expected samples (C, *S) of one to three spatial axes, got {shape}")
        out = tuple(axis.out for axis in self.axes(shape))
        count_taps((sum(out),))  # each output index may need its own slice
        return (shape[0], *out)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return ops.interpolate(
            x,
            self.size,
            self.scale_factor,
            self.mode,
            self.align_corners,
            coordinates=self.coordinates,
            rounding=self.rounding,
            keep=keep,
        )

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return ops.interpolate_backward(dy, cache)


class PixelShuffle(Layer):
    """Rearrange channels into pixels: x (N, C*r*r, H, W) -> y (N, C, H*r, W*r), as
    torch.nn.PixelShuffle (Shi et al., 2016).

        Sequential(Conv2d(64, 3 * 4, 3, padding=1), PixelShuffle(2))  # twice the size

    Args:
        upscale_factor: r.

    Raises:
        ShapeError: when the network is built, if the input channels are not a multiple of r*r.
    """

    def __init__(self, upscale_factor: int) -> None:
        self.upscale_factor = _factor(self, "upscale_factor", upscale_factor)

    def infer(self, shape: Shape) -> Shape:
        return check_shuffle(shape, self.upscale_factor)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return ops.pixel_shuffle(x, self.upscale_factor, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return ops.pixel_shuffle_backward(dy, cache)


class PixelUnshuffle(Layer):
    """Rearrange pixels into channels: x (N, C, H*r, W*r) -> y (N, C*r*r, H, W), as
    torch.nn.PixelUnshuffle.

    Args:
        downscale_factor: r.

    Raises:
        ShapeError: when the network is built, if the input's height or width is not a multiple of
            r.
    """

    def __init__(self, downscale_factor: int) -> None:
        self.downscale_factor = _factor(self, "downscale_factor", downscale_factor)

    def infer(self, shape: Shape) -> Shape:
        return check_unshuffle(shape, self.downscale_factor)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return ops.pixel_unshuffle(x, self.downscale_factor, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return ops.pixel_unshuffle_backward(dy, cache)


def _factor(layer: Layer, name: str, value: int) -> int:
    try:
        return whole(name, value, 1)
    except PortacnnError as error:
        raise error.at(type(layer).__name__)
