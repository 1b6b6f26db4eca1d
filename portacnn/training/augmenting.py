"""``Augmenter``: the augmentation of a training run's batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from portacnn.augment import Transform
from portacnn.augment.applying import (
    apply_to,
    check_loss,
    checked,
    key_of,
    output_shape,
    range_of_channels,
)
from portacnn.augment.base import Batch, Range, is_mask
from portacnn.errors import ShapeError
from portacnn.losses import Loss
from portacnn.models import Model
from portacnn.models.info import range_of
from portacnn.runtime import Array
from portacnn.training.sets import Sets


@dataclass(frozen=True)
class Augmenter:
    """Changes the batches of a training run.

    Attributes:
        transforms: of ``portacnn.augment``, in their order.
        key: of the random numbers.
        range: what the network gets for black and white. Of uint8 images: what ``preprocess`` makes
            of 0 and 255. Of others: the smallest and largest value of the first training images.
        classes: the number of classes, if targets are classes.
        fill: what masks hold outside the image: the loss's ``ignore_index``, or 0.
    """

    transforms: tuple[Transform, ...]
    key: tuple[int, int]
    range: Range = ((0.0,), (1.0,))
    classes: int | None = None
    fill: int = 0

    @property
    def looks_back(self) -> int:
        """How many images before an image in its batch change it, at most."""
        return sum(transform.looks_back for transform in self.transforms)

    def __call__(
        self, x: Array, t: Array, weight: Array | None = None, *, epoch: Any, indices: Array
    ) -> tuple[Array, ...]:
        """Return images, targets and weights (if there are any) of a batch, changed.

        Args:
            x: (N, C, ...) as the network gets them.
            epoch: from 0: an int, or a 0-dimensional int64 array on the device.
            indices: of the images in the training set, int64 (N,) on the device.
        """
        batch = Batch(x, t, None, weight, self.range, self.classes, self.fill)
        apply_to(batch, self.transforms, self.key, epoch, indices)
        changed = (batch.images, batch.targets)
        return changed if weight is None else (*changed, batch.weights)


def make_augmenter(augment: Any, model: Model, sets: Sets, loss: Loss, seed: int) -> Augmenter:
    """Return the augmentation of a training run.

    Args:
        augment: the Trainer's argument.

    Raises:
        ArgumentError: if it is not a list of transforms, or the loss cannot take mixed targets.
        ShapeError: if the transforms are for other images, or the model does not take their size.
    """
    images, targets = sets.train.images, sets.train.targets
    shape = tuple(images.shape[1:])
    transforms = checked(augment, shape)
    if not transforms:
        return Augmenter((), key_of(seed))
    check_loss(transforms, loss, is_mask(tuple(targets.shape), tuple(images.shape)))
    _check_size(transforms, model, shape)
    classes = model.output_shape[0] if loss.task == "multiclass" else None
    fill = 0 if loss.ignore_index is None else loss.ignore_index
    return Augmenter(transforms, key_of(seed), _range(model, images), classes, fill)


def _check_size(transforms: Sequence[Transform], model: Model, shape: tuple[int, ...]) -> None:
    """Raise ShapeError unless the model takes images of the size that crops make."""
    made = output_shape(transforms, shape)
    if made == shape:
        return
    home = model.home
    try:
        model.kept_as(home.xp.empty((1, *made), dtype=home.dtype(model.dtype), device=home.device))
    except ShapeError as error:
        raise ShapeError(f"augment={list(transforms)} makes images {made}: {error}") from error


def _range(model: Model, images: Array) -> Range:
    """Return what the network gets for black and white."""
    with model.home.active():
        found = range_of(images)
    if found:
        return range_of_channels(found)
    if model.preprocess is None:
        return (0.0,), (1.0,)
    mean, std = model.preprocess.in_pixels(int(model.input_shape[0]))
    return range_of_channels(
        tuple([(end - m) / s for m, s in zip(mean, std, strict=True)] for end in (0.0, 255.0))
    )
