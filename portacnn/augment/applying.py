"""Apply a list of transforms to a batch; check a list; the lists that words mean; a list as JSON.

Notation: N images in the batch, C channels, H/W their size.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from portacnn.arguments import plain, told, whole
from portacnn.augment.base import PER_TRANSFORM, Batch, Range, Transform, drawn
from portacnn.augment.geometric import (
    Affine,
    Geometric,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    Rotation,
    Scale,
    Shift,
    VerticalFlip,
    warp_batch,
)
from portacnn.augment.maps import Map
from portacnn.augment.mixing import CutMix, MixUp
from portacnn.augment.pixels import Brightness, Contrast, CutOut
from portacnn.errors import ArgumentError, ArrayError, ModelFormatError, ShapeError
from portacnn.ops.layout import pack
from portacnn.runtime import Array, backend_of, describe, is_float, where
from portacnn.seeds import words

KINDS: dict[str, type[Transform]] = {
    kind.__name__: kind
    for kind in (
        Shift,
        HorizontalFlip,
        VerticalFlip,
        RandomCrop,
        RandomResizedCrop,
        Rotation,
        Scale,
        Affine,
        Brightness,
        Contrast,
        CutOut,
        MixUp,
        CutMix,
    )
}
"""The transforms by name."""

_key = lru_cache(maxsize=256)(words)


def checked(transforms: Any, input_shape: Sequence[int] | None = None) -> tuple[Transform, ...]:
    """Return transforms, given as one, a list or None, as a tuple. Text stands for what ``named``
    makes of it.

    Args:
        input_shape: (C, H, W) of the images.

    Raises:
        ArgumentError: if one is not a ``Transform``, or draws too many numbers.
        ShapeError: if they are for images (C, H, W), and these are not.
    """
    if transforms is None:
        return ()
    one = isinstance(transforms, str | Transform) or not isinstance(transforms, Iterable)
    several: tuple[Any, ...] = ()
    for each in (transforms,) if one else transforms:
        several += tuple(named(each, input_shape)) if isinstance(each, str) else (each,)
    for transform in several:
        if not isinstance(transform, Transform):
            hint = "(...)" if isinstance(transform, type) else ""
            raise ArgumentError(
                "augment must be a list of transforms of portacnn.augment, such as "
                f"[HorizontalFlip()], got {told(transform)}"
                f"{'; make an object of it: ' + transform.__name__ + hint if hint else ''}"
            )
        if not 0 <= transform.draws < PER_TRANSFORM:
            raise ArgumentError(
                f"{type(transform).__name__}.draws must be at most {PER_TRANSFORM - 1}, got "
                f"{transform.draws}"
            )
        if transform.images_only and input_shape is not None and len(input_shape) != 3:
            raise ShapeError(
                f"{type(transform).__name__} is for images (C, H, W), the model takes "
                f"{tuple(input_shape)}"
            )
    return several


def output_shape(transforms: Sequence[Transform], shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape (C, H, W) of the transformed images. Raises ShapeError if a crop is larger
    than the images."""
    shape = tuple(shape)
    for transform in transforms:
        if isinstance(transform, Geometric):
            shape = (*shape[:-2], *transform.size((shape[-2], shape[-1])))
    return shape


def check_loss(transforms: Sequence[Transform], loss: Any, masks: bool) -> None:
    """Raise ArgumentError if a transform mixes targets and the loss cannot take that, or moves
    images whose targets are boxes.

    Args:
        masks: whether the targets are masks, which ``CutMix`` does not mix.
    """
    for transform in transforms:
        if loss.task == "detection" and isinstance(transform, Geometric):
            raise ArgumentError(
                f"{type(transform).__name__} moves the images, but not the boxes that "
                f"{type(loss).__name__} takes; change images and boxes together before the "
                f"training, or leave {type(transform).__name__} out"
            )
        mixes = isinstance(transform, MixUp) or (isinstance(transform, CutMix) and not masks)
        if mixes and not loss.soft_targets:
            ignored = getattr(loss, "ignore_index", None)
            why = f" with ignore_index={ignored}" if ignored is not None else ""
            raise ArgumentError(
                f"{type(transform).__name__} makes targets that are shares of classes, which "
                f"{type(loss).__name__}{why} does not take; use CrossEntropy() without "
                "ignore_index, BCEWithLogits, Focal(multilabel=True) or a loss of values (MSE), "
                f"or leave {type(transform).__name__} out"
            )


# --- a batch --------------------------------------------------------------------------------------


def apply_to(
    batch: Batch, transforms: Sequence[Transform], key: tuple[int, int], epoch: Any, indices: Array
) -> None:
    """Apply the transforms in their order. Consecutive geometric ones are one warp.

    Args:
        epoch: an int, or a 0-dimensional int64 array on the device.
        indices: of the samples in their set, int64 (N,) on the device.
    """
    draws = drawn(batch.images, key, epoch, indices, len(transforms))
    waiting: Map | None = None  # what geometric transforms have not yet done
    fill: float | None = None  # of the border that they show, if any
    for transform, draw in zip(transforms, draws, strict=True):
        if not isinstance(transform, Geometric):
            if waiting is not None:
                warp_batch(batch, waiting, fill)
                waiting = fill = None
            transform.apply(batch, draw)
            continue
        if waiting is not None and fill is not None and transform.fill not in (None, fill):
            warp_batch(batch, waiting, fill)
            waiting = fill = None
        size = batch.images.shape[2:] if waiting is None else waiting.size
        waiting = transform.drawn_map(draw, tuple(size)).after(waiting)
        fill = fill if transform.fill is None else transform.fill
    if waiting is not None:
        warp_batch(batch, waiting, fill)


class Augmented(NamedTuple):
    """What ``apply`` returns: images, targets and boxes, each as it was given, or None."""

    images: Array
    targets: Array | None = None
    boxes: Array | None = None


def apply(
    transforms: Transform | str | Sequence[Transform | str],
    images: Array,
    targets: Array | None = None,
    *,
    boxes: Array | None = None,
    seed: int = 0,
    epoch: int = 0,
    indices: Array | None = None,
    input_range: tuple[Any, Any] | None = None,
    classes: int | None = None,
    fill: int = 0,
) -> Augmented:
    """Apply transforms to a batch, as a training run does.

        >>> import numpy as np
        >>> from portacnn import augment
        >>> x = np.arange(4.0, dtype="float32").reshape(1, 1, 2, 2)
        >>> augment.apply([augment.HorizontalFlip(p=1.0)], x).images.tolist()
        [[[[1.0, 0.0], [3.0, 2.0]]]]

    Args:
        transforms: one, a list, or text that ``named`` takes.
        images: (N, C, H, W), floating point or uint8. uint8 images are returned as uint8.
        targets: (N, ...), or None. Arrays whose last two axes are the images' H and W are masks and
            are warped too.
        boxes: (N, K, 4) of (x1, y1, x2, y2) in pixels, floating point. Boxes that leave the image
            get no area.
        seed, epoch, indices: the key of the random numbers. ``indices`` are the samples' places in
            their set, whole numbers (N,); the default is 0, 1, 2, ...
        input_range: the values of black and white: two numbers, or two with a value per channel.
            The default is (0, 1), for uint8 (0, 255).
        classes: the number of classes, if ``MixUp`` or ``CutMix`` should mix integer targets as
            shares of classes.
        fill: what integer masks hold outside the image.

    Raises:
        ArgumentError, ShapeError, ArrayError: if an argument does not fit.
    """
    shape = tuple(images.shape[1:]) if images.ndim == 4 else None
    several, backend = checked(transforms, shape), backend_of(images)
    xp, dtype = backend.xp, images.dtype
    bytes_ = dtype == xp.uint8
    if images.ndim < 2 or (images.ndim != 4 and any(each.images_only for each in several)):
        raise ShapeError(f"expected images (N, C, H, W), got {describe(images)}")
    if not bytes_ and not is_float(xp, dtype):
        raise ArrayError(f"expected images of floating point or uint8, got {describe(images)}")
    n = images.shape[0]
    for name, array in (("targets", targets), ("boxes", boxes)):
        if array is not None and array.shape[0] != n:
            raise ShapeError(f"expected {name} for {n} images, got {describe(array)}")
    if boxes is not None and (boxes.ndim != 3 or boxes.shape[2] != 4):
        raise ShapeError(f"expected boxes (N, K, 4), got {describe(boxes)}")
    output_shape(several, images.shape[1:])
    with where(images):
        if indices is None:
            indices = xp.arange(n, dtype=xp.int64, device=images.device)
        elif not hasattr(indices, "shape"):
            indices = xp.asarray(indices, dtype=xp.int64, device=images.device)
        if tuple(indices.shape) != (n,) or not xp.isdtype(indices.dtype, "integral"):
            raise ShapeError(f"expected an index for each of {n} images, got {describe(indices)}")
        if input_range is None:
            input_range = (0.0, 255.0) if bytes_ else (0.0, 1.0)
        x = pack(xp.astype(images, xp.float32) if bytes_ else images)
        batch = Batch(x, targets, boxes, None, range_of_channels(input_range), classes, fill)
        apply_to(
            batch, several, key_of(seed), whole("epoch", epoch, 0), xp.astype(indices, xp.int64)
        )
        made = batch.images
        if bytes_:
            made = xp.astype(xp.floor(xp.maximum(xp.minimum(made, 255.0), 0.0) + 0.5), xp.uint8)
    return Augmented(made, batch.targets, batch.boxes)


def key_of(seed: int) -> tuple[int, int]:
    """Return the key of the random numbers of augmentation under a seed."""
    return _key(seed, "augment")


def range_of_channels(given: Any) -> Range:
    """Return black and white from two numbers, or two sequences with a number per channel. Equal
    values of all channels become one. Raises ArgumentError."""
    try:
        black, white = (
            tuple(map(float, end)) if hasattr(end, "__len__") else (float(end),) for end in given
        )
    except (TypeError, ValueError):
        raise ArgumentError(f"input_range must be (black, white), got {told(given)}") from None
    if len(black) != len(white) or any(b > w for b, w in zip(black, white, strict=True)):
        raise ArgumentError(f"input_range must be (black, white) in this order, got {told(given)}")
    if len(set(black)) == len(set(white)) == 1:
        return black[:1], white[:1]
    return black, white


# --- lists ----------------------------------------------------------------------------------------


def standard(input_shape: Sequence[int]) -> list[Transform]:
    """Return the transforms that ``augment="standard"`` and the command's ``--augment`` mean.

    Gray images, which are often digits or letters, are moved, turned and scaled a little, and not
    mirrored. Small color images are mirrored and shifted as is usual for CIFAR. Larger ones are
    mirrored, cropped and resized, with other brightness and contrast. Inputs that are not images
    get other brightness and contrast.

        >>> standard((1, 28, 28))[0].degrees
        (-10.0, 10.0)

    Args:
        input_shape: (C, H, W) of the images.
    """
    if len(input_shape) != 3:
        return [Brightness(0.2), Contrast(0.2)]
    channels, *size = input_shape
    if channels == 1:
        return [Affine(degrees=10.0, translate=0.08, scale=(0.9, 1.1))]
    if max(size) <= 64:
        return [HorizontalFlip(), RandomCrop(padding=(max(1, size[0] // 8), max(1, size[1] // 8)))]
    return [HorizontalFlip(), RandomResizedCrop((0.35, 1.0)), Brightness(0.2), Contrast(0.2)]


def named(text: str, input_shape: Sequence[int] | None = None) -> list[Transform]:
    """Return the transforms that a text stands for, as the command's ``--augment`` takes it: words,
    separated by commas.

    A word is "standard", or the name of a transform, in which case and underscores do not matter.
    After ``=`` it may have the transform's first argument: a number, or a range LOW..HIGH.

        >>> named("horizontal_flip, random_crop=2, scale=0.8..1.2")[2].factor
        (0.8, 1.2)

    Args:
        input_shape: (C, H, W) of the images, for "standard".

    Raises:
        ArgumentError: if a word is unknown, or its number out of range.
    """
    made: list[Transform] = []
    for word in text.split(","):
        name, equals, value = (part.strip() for part in word.partition("="))
        plain_name = name.replace("_", "").replace("-", "").lower()
        if plain_name == "standard" and not equals:
            if input_shape is None:
                raise ArgumentError(
                    '"standard" depends on the images; use augment.standard(input_shape)'
                )
            made.extend(standard(input_shape))
            continue
        kind = next((KINDS[known] for known in KINDS if known.lower() == plain_name), None)
        if kind is None:
            known = ["standard", *map(word_of, KINDS)]
            close = get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ArgumentError(f"unknown transform {told(word.strip())}; {hint}")
        try:
            made.append(kind(_argument(value)) if equals else kind())
        except ArgumentError as error:
            raise error.at(word.strip(), over=True) from None
    return made


def word_of(name: str) -> str:
    """Return the word for a transform's class: "HorizontalFlip" -> "horizontal_flip"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _argument(text: str) -> Any:
    """Return the number or the range (low, high) of a word."""
    numbers = []
    for part in text.split(".."):
        try:
            numbers.append(int(part) if re.fullmatch(r"[+-]?\d+", part) else float(part))
        except ValueError:
            raise ArgumentError(f"expected a number or LOW..HIGH, got {told(text)}") from None
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def describe_augment(transforms: Sequence[Transform]) -> list[dict[str, Any]]:
    """Return transforms as JSON values: their classes and their fields.

    Raises:
        ArgumentError: if one is the caller's own, which files cannot hold.
    """
    made = []
    for transform in transforms:
        kind = type(transform)
        if KINDS.get(kind.__name__) is not kind:
            raise ArgumentError(
                f"a file can hold the transforms {', '.join(KINDS)}, got {kind.__qualname__}"
            )
        values = {field.name: getattr(transform, field.name) for field in fields(transform)}  # type: ignore[arg-type]
        made.append({"class": kind.__name__, "arguments": plain(values)})
    return made


def rebuild_augment(described: Any) -> list[Transform]:
    """Return the transforms that ``describe_augment`` described. Raises the constructors'
    errors."""
    if described is None:
        return []
    made = []
    for each in described:
        if each["class"] not in KINDS:
            raise ModelFormatError(f"unknown transform {told(each['class'])}; upgrade portacnn")
        arguments = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in each["arguments"].items()
        }
        made.append(KINDS[each["class"]](**arguments))
    return made
