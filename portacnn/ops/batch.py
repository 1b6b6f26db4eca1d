"""From a data set to a batch: gather some images, normalise their pixels, lay them out as the
backend prefers.

Notation: N images in the set, B in the batch, C channels, S the spatial axes.

A set is best kept as it was read: uint8 takes a quarter of float32's memory, and a batch gathered
from it a quarter of the traffic. Pixels become floats here, once a step, and as bytes they are also
turned batch-last, where the backend wants that.
"""

from portacnn.errors import ArgumentError, ArrayError, ShapeError
from portacnn.ops.dispatch import check_arrays, op
from portacnn.ops.layout import pack
from portacnn.runtime import Array, backend_of, describe, is_float


def _check(
    images: Array, indices: Array | None = None, mean: Array | None = None, std: Array | None = None
) -> None:
    name, backend = "take_batch", backend_of(images)
    for word, array in (("indices", indices), ("std", std)):
        if array is not None and (
            backend_of(array).name != backend.name or array.device != images.device
        ):
            check_arrays(name, integers=True, images=images, **{word: array})
    if images.ndim < 2:
        raise ShapeError(f"expected images (N, C, *S), got {describe(images)}", name)
    if indices is not None and (
        indices.ndim != 1 or indices.dtype == backend.xp.bool or is_float(backend.xp, indices.dtype)
    ):
        raise ArrayError(f"indices must be integers (B,), got {describe(indices)}", name)
    if std is None:
        if mean is not None:
            raise ArgumentError("mean is given without std; pass ones for it", name)
        check_arrays(name, images=images)
        return
    check_arrays(name, std=std, mean=mean)
    if images.dtype != backend.xp.uint8:
        raise ArrayError(f"images to be normalised must be uint8, got {describe(images)}", name)
    expected = (images.shape[1], *(1,) * (images.ndim - 2))
    for word, array in (("mean", mean), ("std", std)):
        if array is not None and tuple(array.shape) != expected:
            raise ShapeError(
                f"{word} must have one number for each channel, {expected} for images "
                f"{tuple(images.shape)}; "
                f"got {tuple(array.shape)}",
                name,
            )


@op(_check)
def take_batch(
    images: Array, indices: Array | None = None, mean: Array | None = None, std: Array | None = None
) -> Array:
    """A batch of a set's images, (pixels - mean) / std, laid out in memory as the backend prefers.

    Subtraction and division are done in the dtype of ``std`` and rounded once each, so the same
    pixels give the same bits on every backend, and with std 255 those of ``pixels / 255``.

    Args:
        images: (N, C, *S), or (N, C). uint8 where ``std`` is given, else floating point.
        indices: which of them, in which order: integers (B,) in 0..N-1. None takes all.
        mean, std: floating point, (C, 1, ...), in units of the pixels. No ``mean`` stands for 0; no
            ``std`` for images that are normalised already.

    Returns:
        (B, C, *S) of the dtype of ``std``, else of the images' own. Without ``indices`` and ``std``
        it may be ``images`` itself.

    Raises:
        ArrayError: mixed libraries or devices; integers without ``std``, or other than uint8 with
            it; indices that are not integers (B,).
        ShapeError, ArgumentError: a mean or std that does not fit the channels; a mean without a
            std.
    """
    xp = backend_of(images).xp
    x = pack(images if indices is None else xp.take(images, indices, axis=0))
    if std is None:
        return x
    x = xp.astype(x, std.dtype)
    return (x if mean is None else x - mean) / std
