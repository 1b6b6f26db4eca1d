"""How a model takes images of each size: whether it does at all, and how many of them at a time.

A fully convolutional network takes images of another size than the one it is built for, if every
layer accepts it with the parameters that it has.
"""

from collections.abc import Iterator
from contextlib import closing
from math import prod
from typing import Any, NamedTuple, Self

from portacnn.data.rows import Rows
from portacnn.errors import PortacnnError
from portacnn.layers import Flatten, Layer, MergeIntoBatch, Reshape, SplitFromBatch
from portacnn.layers.base import Shape
from portacnn.layers.state import outline
from portacnn.models.inputs import image_count
from portacnn.runtime import Array

_MAX_BYTES = 512 << 20  # bytes for the arrays in use at one time in ``predict``
_MOST = 256  # images at a time in ``predict``
_MOST_SIZES = 64  # of images that a model remembers


class Size(NamedTuple):
    """Images of one size.

    Attributes:
        most, least: the number of images that ``predict`` processes at a time.
        reason: None if the model accepts them; otherwise the reason, for an error message.
    """

    most: int
    least: int
    reason: str | None = None

    @classmethod
    def of(cls, planned: Layer) -> Self:
        """For the size that a network is planned for.

        While a layer runs, its input, its output, a shortcut and temporary arrays are in use: four
        of the largest outputs.
        """
        largest, rows = 1, 1  # rows of each sample
        for layer in planned.walk():
            if isinstance(layer, MergeIntoBatch):
                rows *= layer.rows
            elif isinstance(layer, SplitFromBatch):
                rows = max(1, rows // layer.rows)
            if not layer.children:
                largest = max(largest, *(rows * prod(p.output_shape) for p in layer.places), 1)
        numbers = 4 * largest
        least = max(layer.least_predicted for layer in planned.walk())
        return cls(max(least, min(_MOST, _MAX_BYTES // (8 * max(numbers, 1)))), least)

    @classmethod
    def refused(cls, reason: str) -> Self:
        """For images that a model does not take."""
        return cls(_MOST, 1, reason)

    def batches(self, x: Array, batch_size: int | None) -> Iterator[tuple[int, int, Array]]:
        """Yield the batches of ``predict``: first, last (exclusive) and images. At least one."""
        count, size = image_count(x), batch_size or self.most
        ends = [*range(size, count, size), count]
        if len(ends) > 1 and size >= self.least > count - ends[-2]:
            del ends[-2]
        pairs = list(zip((0, *ends[:-1]), ends, strict=True))
        if isinstance(x, Rows):
            with closing(x.batches(slice(*pair) for pair in pairs)) as read:
                for (i, j), images in zip(pairs, read, strict=True):
                    yield i, j, images
            return
        for i, j in pairs:
            yield i, j, x if j - i == count else x[i:j, ...]


class Sizes:
    """The sizes of images for which one model was called."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, Shape], Size] = {}

    def __reduce__(self) -> Any:
        return Sizes, ()  # a copy or an unpickled object starts without sizes

    def of(self, x: Array, model: Layer) -> Size:
        """Return the ``Size`` for images of this size: the built one, or another that all layers
        accept with their parameters."""
        shape, built = tuple(x.shape[1:]), model.input_shape
        if shape != built and (x.ndim != len(built) + 1 or shape[:1] != built[:1]):
            return Size.refused("")
        key = model.revision, shape
        size = self._known.get(key)
        if size is None:
            size = Size.of(model) if shape == built else _another(model, shape)
            if len(self._known) >= _MOST_SIZES:
                self._known = {}
            self._known[key] = size
        return size


def _another(model: Layer, shape: Shape) -> Size:
    """Return the ``Size`` for images of a size that the model is not built for."""
    for layer in model.walk():
        if isinstance(layer, Flatten | Reshape) and any(
            prod(place.input_shape[1:]) > 1 for place in layer.places
        ):
            return Size.refused(f"; {layer.where} fits this size only")
    twin = outline(model)
    try:
        twin.plan(shape)
    except PortacnnError as error:
        return Size.refused(f"; another size does not fit: {error}")
    for ours, theirs in zip(model.walk(), twin.walk(), strict=True):
        for has, needs in (
            (ours.declared, theirs.declared),
            (ours.declared_buffers, theirs.declared_buffers),
        ):
            for name, spec in needs.items():
                if name not in has or has[name].shape != spec.shape:
                    return Size.refused(
                        f"; for images {shape}, {ours.full_name(name)} would have to be "
                        f"{spec.shape}"
                    )
    return Size.of(twin)
