"""What a model takes as images: their shape, the hints for arrays that do not fit, and how pixels
are scaled."""

import logging
from collections.abc import Sequence
from math import prod
from typing import Any

from portacnn.arguments import whole
from portacnn.data.rows import form
from portacnn.errors import PortacnnError, ShapeError
from portacnn.layers.base import Shape
from portacnn.models.preprocess import Normalize
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, backend_of, describe, is_float

_log = logging.getLogger("portacnn")


def image_shape(
    model: str, num_classes: int, in_channels: int, input_size: int | Sequence[int]
) -> Shape:
    """Return the checked (C, H, W) of the images of a model that builds itself.

    Raises:
        ArgumentError: if an argument is out of range; the error names the model.
    """
    try:
        whole("num_classes", num_classes, 1)
        return (whole("in_channels", in_channels, 1), *per_axis("input_size", input_size, 2, 1))
    except PortacnnError as error:
        raise error.at(model)


def image_count(x: Array) -> int:
    """Return the number of images in x. Raises ShapeError if it has no axes."""
    backend_of(form(x))
    if x.ndim < 1:
        raise ShapeError(f"expected images (N, C, H, W), got {describe(x)}")
    return x.shape[0]


def check_fits(preprocess: Normalize, sample: Shape, where: str) -> None:
    """Raise ArgumentError, ShapeError unless ``preprocess`` is for such samples (C, H, W)."""
    try:
        preprocess.check(sample)
    except PortacnnError as error:
        raise error.at(where)


def reshaping(x: Array, sample: Shape) -> str:
    """Return how to reshape an array to samples (C, H, W), for a message; empty if no way is
    likely."""
    shape, (channels, *size) = tuple(x.shape), sample
    last = (*size, channels)
    turn = "permute" if hasattr(x, "permute") else "transpose"
    axes = (0, len(sample), *range(1, len(sample)))
    if len(shape) == len(sample) + 1 and shape[-1:] == (4,) and last == (*shape[1:-1], 3):
        return f"; leave out the fourth channel, opacity: x[..., :3].{turn}{axes}"
    if shape == sample:
        return "; make one image a batch: x[None]"
    if shape == last:
        return f"; channels come first, and one image must be a batch: x[None].{turn}{axes}"
    if shape[1:] == last:
        return f"; channels come first: x.{turn}{axes}"
    if channels == 1 and shape[1:] == tuple(size):
        return "; add a channel axis: x[:, None]"
    if channels == 1 and shape == tuple(size):
        return "; add a batch and a channel axis: x[None, None]"
    if len(shape) == 2 and shape[1] == prod(sample):
        return f"; x.reshape{(-1, *sample)}"
    if shape[1:] == tuple(size):
        return f"; repeat the gray images: x[:, None][:, {[0] * channels}]"
    if shape == tuple(size):
        return f"; repeat the gray image: x[None, None][:, {[0] * channels}]"
    if len(shape) == len(sample) + 1 and shape[2:] == tuple(size):
        if shape[1] == 1:
            return f"; repeat the gray channel: x[:, {[0] * channels}]"
        if shape[1] == 4 and channels == 3:
            return "; leave out the fourth channel, opacity: x[:, :3]"
        if channels == 1:
            same = "" if is_float(backend_of(x).xp, x.dtype) else ".astype(x.dtype)"
            return f"; make the channels one: x.mean(1)[:, None]{same}"
    if len(shape) == len(sample) + 1 and shape[1] == channels:
        return f"; resize the images to {'x'.join(map(str, size))} pixels"
    return ""


class Pixels:
    """How one model's images are scaled: what ``preprocess`` maps bytes to, and whether
    floating-point images are on the same scale.

    The model is the argument of each method, because a reference to it would be a reference cycle.
    """

    def __init__(self) -> None:
        self._floats_seen = False  # whether floating-point images on a device were checked
        self._warned = False  # that floating-point images look like bytes
        # key of the cache; mean; std
        self._constants: tuple[tuple[Any, ...], Array | None, Array] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_constants": None}

    def check_next_on_a_device(self, check: bool) -> None:
        """Check the next floating-point images on a device, or none until this is called again."""
        self._floats_seen = not check

    def look_at_floats(self, x: Array, model: Any, known: Sequence[float]) -> None:
        """Warn once if floating-point images are on another scale than the model's: pixels 0..255
        for one that was trained on 0..1, or the other way, or pixels that ``preprocess`` would have
        scaled if they were uint8.

        NumPy images are checked in each call; those on a device only the first time, because
        reading waits there.

        Args:
            known: the range of the images that the model was trained on, empty if it is not known.
        """
        source = backend_of(x)
        if not known and model.preprocess is None:
            return
        if self._warned or 0 in x.shape or (self._floats_seen and source.name != "numpy"):
            return
        self._floats_seen = True
        some = source.xp.abs(x[: min(16, x.shape[0]), ...])
        largest = float(source.to_host(source.xp.max(some)))
        usual = max(map(abs, known)) if known else self._largest_of_bytes(model)
        if model.preprocess is not None and largest > 8 * max(usual, self._largest_of_bytes(model)):
            self._warned = True
            _log.warning(
                "%s: preprocess does not apply to floating-point images, but these reach %g, "
                "while it maps a byte to at most %g. If they are pixels 0..255, pass them as "
                "uint8: x.astype('uint8')",
                model.where,
                largest,
                self._largest_of_bytes(model),
            )
        elif known and (largest > 8 * max(usual, 1.0) or largest <= 1.0 < 100.0 <= usual):
            self._warned = largest > 0.0  # an image may be black
            if self._warned:
                up = largest > usual
                _log.warning(
                    "%s: the model was trained on images of %.3g..%.3g, these go to %.3g. If they "
                    "are %s: %s",
                    model.where,
                    *known,
                    largest,
                    "pixels 0..255, scale them as in training" if up else "shares 0..1",
                    "x / 255" if up else "x * 255",
                )

    def mean_and_std(self, model: Any) -> tuple[Array | None, Array]:
        """Return mean and std of ``preprocess`` on the device, in units of the pixels. They are
        cached."""
        made_for = (model.preprocess, model.backend, model.dtype, model.input_shape)
        if self._constants is None or self._constants[0] != made_for:
            home, (channels, *size) = model.home, model.input_shape
            mean, std = (
                home.xp.reshape(home.asarray(values, model.dtype), (channels, *(1 for _ in size)))
                if any(values)
                else None
                for values in model.preprocess.in_pixels(channels)
            )
            self._constants = made_for, mean, std
        return self._constants[1:]

    def _largest_of_bytes(self, model: Any) -> float:
        """Return the largest magnitude that ``preprocess`` maps a byte to."""
        means, stds = model.preprocess.in_pixels(model.input_shape[0])
        return max(
            abs(pixel - mean) / std
            for pixel in (0, 255)
            for mean, std in zip(means, stds, strict=True)
        )
