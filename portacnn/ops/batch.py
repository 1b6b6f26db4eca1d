"""From a data set to a batch: gather images, normalize their pixels and use the backend's memory
layout.

Notation: N images in the set, B in the batch, C channels, S the spatial axes.

Store a data set with the dtype of its file. uint8 takes a quarter of the memory of float32, and
gathering a batch takes a quarter of the memory traffic. Pixels are converted to floats here, once
per step. The change to batch-last order, for backends that prefer it, is done while they are still
bytes.
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
            raise ArgumentError(
                "expected mean and std together, got mean alone; pass std=ones", name
            )
        check_arrays(name, images=images)
        return
    check_arrays(name, std=std, mean=mean)
    if images.dtype != backend.xp.uint8:
        raise ArrayError(f"images must be uint8 if std is given, got {describe(images)}", name)
    expected = (images.shape[1], *(1,) * (images.ndim - 2))
    for word, array in (("mean", mean), ("std", std)):
        if array is not None and tuple(array.shape) != expected:
            raise ShapeError(
                f"{word} must have one value per channel, shape {expected} for images "
                f"{tuple(images.shape)}; "
                f"got {tuple(array.shape)}",
                name,
            )


@op(_check)
def take_batch(
    images: Array, indices: Array | None = None, mean: Array | None = None, std: Array | None = None
) -> Array:
    """Gather a batch of images, compute (pixels - mean) / std and use the backend's memory layout.

    Subtraction and division run in the dtype of ``std`` and are rounded once each. Equal pixels
    therefore give equal bits on every backend, and std 255 gives the bits of ``pixels / 255``.

    Args:
        images: (N, C, *S) or (N, C); uint8 if ``std`` is given, else floating point.
        indices: which images, in which order: integers (B,) in 0..N-1. None selects all.
        mean, std: (C, 1, ...), floating point, in units of the pixels. A mean of None means 0. A
            std of None means that the images are normalized already.

    Returns:
        (B, C, *S) in the dtype of ``std``, or in that of the images if there is no ``std``. Without
        ``indices`` and ``std`` the result may be ``images`` itself.

    Raises:
        ArrayError: if arrays differ in library or device; if the images are integers without
            ``std``, or not uint8 with it; if indices are not integers (B,).
        ShapeError: if a mean or std does not match the channels.
        ArgumentError: if there is a mean without a std.

    Example:
        >>> images = np.array([[[[0, 255]]], [[[51, 102]]]], dtype="uint8")
        >>> ops.take_batch(images, np.array([1]), std=np.full((1, 1, 1), 255.0))
        array([[[[0.2, 0.4]]]])
    """
    xp = backend_of(images).xp
    x = pack(images if indices is None else xp.take(images, indices, axis=0))
    if std is None:
        return x
    x = xp.astype(x, std.dtype)
    return (x if mean is None else x - mean) / std
