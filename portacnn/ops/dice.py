"""Dice loss: how much of two masks does not overlap (Milletari et al., "V-Net", 2016).

The Dice coefficient of two sets is twice their intersection over the sum of their sizes. Here one
set is given by probabilities p and the other by the target t, 0 or 1:

    dice = (2 * sum(p * t) + smooth) / (sum(p) + sum(t) + smooth)

for each sample and class separately, the sums over the image; ``smooth`` makes it 1 where a class
is in neither. A sample's loss is the mean of 1 - dice over the classes, so the loss of a batch is
the mean of its samples' losses however the batch is cut.

Notation: N batch, C classes, S the image's axes.
"""

from typing import Any

from portacnn.arguments import positive
from portacnn.errors import LabelError, PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.runtime import Array, backend_of, describe, is_float


def _check(
    probabilities: Array,
    target: Array,
    *,
    smooth: float = 1.0,
    weight: Array | None = None,
    ignore_index: int = -100,
    keep: bool = True,
) -> None:
    name = "dice_loss"
    check_arrays(name, probabilities=probabilities, weight=weight)
    if probabilities.ndim < 3:
        raise ShapeError(
            f"expected probabilities (N, C, *S) of images, got {describe(probabilities)}", name
        )
    n, _, *size = probabilities.shape
    if backend_of(target).name != backend_of(probabilities).name or (
        target.device != probabilities.device
    ):
        check_arrays(name, integers=True, probabilities=probabilities, target=target)
    by_index = tuple(target.shape) == (n, *size)
    if not by_index and tuple(target.shape) != tuple(probabilities.shape):
        raise LabelError(
            f"expected labels of shape {(n, *size)} or masks of {tuple(probabilities.shape)}, got "
            f"{tuple(target.shape)}",
            name,
        )
    if by_index and is_float(backend_of(target).xp, target.dtype):
        raise LabelError(f"class indices must be integers, got {describe(target)}", name)
    if weight is not None and tuple(weight.shape) != (n,):
        raise ShapeError(
            f"expected a weight for each of {n} samples, got shape {tuple(weight.shape)}", name
        )
    try:
        positive("smooth", smooth)
    except PortacnnError as error:
        raise error.at(name)


def _over_image(array: Array) -> Array:
    """(N, C, *S) -> (N, C), the sum over the image, one axis after the other: in one go,
    batch-last, its cells would be added one by one."""
    xp = backend_of(array).xp
    while array.ndim > 2:
        array = xp.sum(array, axis=-1)
    return array


def _spread(array: Array, ndim: int) -> Array:
    """(N, C) or (N,) -> the same with axes of length 1 behind, ``ndim`` in all."""
    return backend_of(array).xp.reshape(array, (*array.shape, *(1,) * (ndim - array.ndim)))


@op(_check)
def dice_loss(
    probabilities: Array,
    target: Array,
    *,
    smooth: float = 1.0,
    weight: Array | None = None,
    ignore_index: int = -100,
    keep: bool = True,
) -> tuple[Array, tuple | None]:
    """Return the mean over samples and classes of 1 - dice (see above).

        >>> import numpy as np
        >>> from portacnn import ops
        >>> p = np.array([[[1.0, 0.0], [0.0, 1.0]]])  # (N, C, S)
        >>> loss, cache = ops.dice_loss(p, np.array([[0, 1]]))
        >>> float(loss), ops.dice_loss_backward(1.0, cache).shape
        (0.0, (1, 2, 2))

    Args:
        probabilities: (N, C, *S), floating point, 0 to 1: of a softmax or a sigmoid.
        target: integers (N, *S) in 0..C-1, or masks of probabilities' shape, 0 or 1 (any dtype).
        smooth: see above, greater than 0.
        weight: (N,), a factor for each sample; the mean still divides by N.
        ignore_index: pixels whose integer target has this value are ignored.
        keep: keep what ``dice_loss_backward`` needs.

    Returns:
        The loss, 0-dimensional, and the cache.

    Raises:
        LabelError, ShapeError, ArgumentError, ArrayError: see the message.
    """
    xp = backend_of(probabilities).xp
    dtype, device = probabilities.dtype, probabilities.device
    n, classes = probabilities.shape[:2]
    counts = None
    if target.ndim < probabilities.ndim:
        labels = xp.expand_dims(xp.astype(target, xp.int64), axis=1)
        along_classes = (1, classes) + (1,) * (probabilities.ndim - 2)
        names = xp.reshape(xp.arange(classes, dtype=xp.int64, device=device), along_classes)
        t = xp.astype(labels == names, dtype)
        counts = xp.astype(labels != ignore_index, dtype)
        t, p = t * counts, probabilities * counts
    else:
        t, p = xp.astype(target, dtype), probabilities
    overlap = 2.0 * _over_image(p * t) + smooth
    size = _over_image(p) + _over_image(t) + smooth
    each = (1.0 - overlap / size) / (max(n, 1) * max(classes, 1))
    if weight is not None:
        each = each * xp.expand_dims(weight, axis=1)
    loss = xp.sum(each) if n else xp.full((), float("nan"), dtype=dtype, device=device)
    return loss, (t, counts, overlap, size, weight) if keep else None


@dice_loss.backward
def dice_loss_backward(dy: Array | float, saved: tuple) -> Array:
    """Return dprobabilities (N, C, *S) = dy * weight * (overlap - 2 * t * size) / size^2, divided
    as the mean was."""
    t, counts, overlap, size, weight = saved
    scale: Any = 1.0 / (max(t.shape[0], 1) * max(t.shape[1], 1) * size)
    if weight is not None:
        scale = scale * _spread(weight, 2)
    slope = _spread(scale * overlap / size, t.ndim) - 2.0 * t * _spread(scale, t.ndim)
    return (slope if counts is None else slope * counts) * dy
