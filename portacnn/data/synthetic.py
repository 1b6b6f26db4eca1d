"""Make images whose targets are known: rotated images, drawn shapes, scenes of small images.

    # Notation: N images, C channels, H/W height and width, K scenes, S size of a drawn image.

All of it is NumPy on the host. The same seed makes the same images.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from portacnn.arguments import answering_keywords, one_of, share, whole
from portacnn.errors import ArgumentError, LabelError, ShapeError

_TRIES = 20  # positions that an object of a scene is given
_AT_ONCE = 256  # images whose coordinates are in memory together

SHAPES = ("circle", "square", "triangle")
"""The columns of the labels of :func:`shapes`."""


@answering_keywords("rotate")
def rotate(images: NDArray[Any], degrees: ArrayLike) -> NDArray[Any]:
    """Return images, each rotated about its centre by an angle, counterclockwise on the screen.

    Pixels are interpolated bilinearly. Outside an image everything is 0.

        >>> rotate(np.arange(4.0).reshape(1, 1, 2, 2), 90).round(3).tolist()
        [[[[1.0, 3.0], [0.0, 2.0]]]]

    Args:
        images: (N, C, H, W), of any real type.
        degrees: one angle, or one for each image (N,).

    Returns:
        Images of the same shape and type. Whole numbers are rounded.

    Raises:
        ShapeError: if ``images`` are not (N, C, H, W), or ``degrees`` are not N.
        ArgumentError: if an angle is not a finite number.
    """
    images = _checked_images("rotate", images)
    angles = np.asarray(degrees, dtype=np.float64)
    if angles.shape not in ((), (len(images),)):
        raise ShapeError(
            f"degrees must be one angle or {len(images)}, one for each image; got {angles.shape}",
            "rotate",
        )
    if not np.isfinite(angles).all():
        raise ArgumentError("degrees must be finite", "rotate")
    radians = np.deg2rad(np.broadcast_to(angles, (len(images),)))
    out = np.empty_like(images, order="C")
    for start in range(0, len(images), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        turned = _turned(images[part], radians[part])
        out[part] = turned if images.dtype.kind == "f" else np.rint(turned)
    return out


def _turned(images: NDArray[Any], radians: NDArray[Any]) -> NDArray[Any]:
    n, _, height, width = images.shape
    down, right = (np.arange(size) - (size - 1) / 2 for size in (height, width))
    cos, sin = (each(radians)[:, None, None] for each in (np.cos, np.sin))
    # where a pixel of the result comes from, and the four pixels around that point
    row = cos * down[:, None] + sin * right + (height - 1) / 2
    column = cos * right - sin * down[:, None] + (width - 1) / 2
    top, left = np.floor(row), np.floor(column)
    below, beside = row - top, column - left  # 0..1
    which = np.arange(n)[:, None, None]
    total = np.zeros((n, height, width, images.shape[1]))  # as indexing puts the channels last
    for y, weight_y in ((top, 1 - below), (top + 1, below)):
        for x, weight_x in ((left, 1 - beside), (left + 1, beside)):
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            rows, columns = (np.where(inside, each, 0).astype(np.intp) for each in (y, x))
            share = np.where(inside, weight_y * weight_x, 0.0)
            total += share[..., None] * images[which, :, rows, columns]
    return total.transpose(0, 3, 1, 2)


@answering_keywords("shapes")
def shapes(count: int, *, size: int = 32, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return gray images that show a circle, a square and a triangle, or only some of them.

    Each shape is in an image with probability 1/2, at a random position, size, angle and
    brightness. Shapes may overlap: they are translucent, so that all edges can be seen. There is
    noise over the whole image.

        >>> x, t = shapes(100)
        >>> x.shape, x.dtype, t.shape, t.dtype
        ((100, 1, 32, 32), dtype('float32'), (100, 3), dtype('uint8'))

    Args:
        count: N.
        size: S, height and width, at least 16.
        seed: a whole number.

    Returns:
        Images (N, 1, S, S) in [0, 1], and labels (N, 3): whether circle, square and triangle are
        there, 1 or 0.

    Raises:
        ArgumentError: an argument is out of range.
    """
    count, size = whole("count", count, 1), whole("size", size, 16, 4096)
    rng = np.random.default_rng(whole("seed", seed, 0))
    labels = rng.integers(0, 2, (count, len(SHAPES)), dtype=np.uint8)
    images = rng.uniform(0.0, 0.1, (count, size, size))
    # by image and shape
    radius = rng.uniform(size / 8, size / 5, labels.shape)
    row, column = (rng.uniform(radius, size - 1 - radius) for _ in range(2))
    angle = rng.uniform(0.0, 2 * np.pi, labels.shape)
    brightness = rng.uniform(0.15, 0.3, labels.shape) * labels
    pixel = np.arange(size)
    for k, inside in enumerate((_in_circle, _in_square, _in_triangle)):
        centre_y, centre_x, r, a, light = (
            each[:, k, None, None] for each in (row, column, radius, angle, brightness)
        )
        y, x = pixel[:, None] - centre_y, pixel - centre_x
        along, across = x * np.cos(a) + y * np.sin(a), y * np.cos(a) - x * np.sin(a)
        images += light * inside(along / r, across / r)
    return images[:, None].astype(np.float32), labels


def _in_circle(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    return x * x + y * y <= 1.0


def _in_square(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """The square whose corners lie on the circle of radius 1."""
    return np.maximum(np.abs(x), np.abs(y)) <= np.sqrt(0.5)


def _in_triangle(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """The equilateral triangle whose corners lie on the circle of radius 1."""
    return (x <= 0.5) & (np.sqrt(3) * np.abs(y) - x <= 1.0)


@answering_keywords("scenes")
def scenes(
    images: NDArray[Any],
    labels: ArrayLike,
    count: int,
    *,
    size: int = 64,
    objects: Sequence[int] = (1, 3),
    clutter: int = 6,
    target: str = "masks",
    overlap: float = 1.0,
    seed: int = 0,
) -> tuple[NDArray[Any], Any]:
    """Return scenes composed of small bright images such as digits, and their masks or boxes.

    A scene is black. Fragments of the images, of a third of their height and width, are scattered
    over it as in cluttered MNIST (Mnih et al., 2014); they belong to the background. The objects
    come on top, each one of the images at a random position. Where two overlap, the later one
    counts.

        >>> (x, t), _ = portacnn.load_mnist_sample()
        >>> x, mask = portacnn.data.scenes(x, t, 100)
        >>> x.shape, mask.shape, mask.dtype
        ((100, 1, 64, 64), (100, 64, 64), dtype('uint8'))

    Args:
        images: (N, C, H, W), bright on black, of any real type.
        labels: whole numbers (N,), 0 to 254.
        count: K.
        size: S, height and width of a scene, at least H and W.
        objects: the smallest and the largest number of objects in a scene.
        clutter: the number of fragments in a scene.
        target: "masks" or "boxes".
        overlap: the largest share that two objects' boxes may have in common: their intersection
            over the smaller of the two. An object that finds no such position in 20 tries is left
            out.
        seed: a whole number.

    Returns:
        Scenes (K, C, S, S) of the type of ``images``, and targets. An object's pixels are those
        brighter than a quarter of its brightest.
        Masks: uint8 (K, S, S): 0 is background, label + 1 is an object's pixel.
        Boxes: a list of K mappings: "boxes" float32 (G, 4), the (x1, y1, x2, y2) around the pixels
        of each object, and "labels" int64 (G,). Objects without a pixel have no box.

    Raises:
        ShapeError, LabelError: if images or labels do not fit.
        ArgumentError: an argument is out of range.
    """
    images = _checked_images("scenes", images)
    labels = np.asarray(labels)
    n, channels, height, width = images.shape
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise LabelError(
            f"labels must be {n} whole numbers, one for each image; got "
            f"{labels.dtype} {labels.shape}",
            "scenes",
        )
    if n == 0 or labels.min() < 0 or labels.max() > 254:
        raise LabelError("labels must lie in 0..254, of at least one image", "scenes")
    count, clutter = whole("count", count, 1), whole("clutter", clutter, 0)
    size = whole("size", size, max(height, width))
    fewest, most = (whole("objects", number, 0) for number in objects)
    if fewest > most:
        raise ArgumentError(f"objects must be (smallest, largest), got {objects!r}", "scenes")
    one_of("target", target, "masks", "boxes")
    overlap = share("overlap", overlap)
    rng = np.random.default_rng(whole("seed", seed, 0))
    ink = images.max(axis=1) > images.max(axis=(1, 2, 3), keepdims=True)[:, 0] / 4
    out = np.zeros((count, channels, size, size), dtype=images.dtype)
    masks = np.zeros((count, size, size), dtype=np.uint8)
    part_height, part_width = (max(1, side // 3) for side in (height, width))
    found = []
    for scene, mask in zip(out, masks, strict=True):
        for _ in range(clutter):
            image = images[rng.integers(n)]
            cut = _anywhere(rng, (height, width), (part_height, part_width))
            _paste(scene, image[:, *cut], _anywhere(rng, (size, size), (part_height, part_width)))
        boxes: list[NDArray[Any]] = []
        classes: list[int] = []
        for _ in range(rng.integers(fewest, most + 1)):
            chosen = rng.integers(n)
            for _ in range(_TRIES):
                at = _anywhere(rng, (size, size), (height, width))
                box = _around(ink[chosen], at)
                if all(_common(box, other) <= overlap for other in boxes):
                    break
            else:
                continue
            _paste(scene, images[chosen], at)
            mask[at][ink[chosen]] = labels[chosen] + 1
            if ink[chosen].any():
                boxes.append(box)
                classes.append(int(labels[chosen]))
        found.append(
            {
                "boxes": np.array(boxes, dtype=np.float32).reshape(-1, 4),
                "labels": np.array(classes, dtype=np.int64),
            }
        )
    return out, masks if target == "masks" else found


Window = tuple[slice, slice]


def _anywhere(rng: np.random.Generator, whole_: tuple[int, int], part: tuple[int, int]) -> Window:
    """A window of the size ``part`` in an area of the size ``whole_``."""
    starts = (int(rng.integers(n - m + 1)) for n, m in zip(whole_, part, strict=True))
    rows, columns = (slice(start, start + m) for start, m in zip(starts, part, strict=True))
    return rows, columns


def _around(ink: NDArray[Any], at: Window) -> NDArray[Any]:
    """The box (x1, y1, x2, y2) around the pixels of an image at a place; empty without a pixel."""
    sides = []
    for axis, window in ((0, at[1]), (1, at[0])):
        places = np.flatnonzero(ink.any(axis=axis))
        near, far = (places[0], places[-1] + 1) if len(places) else (0, 0)
        sides.append((window.start + near, window.start + far))
    (x1, x2), (y1, y2) = sides
    return np.array([x1, y1, x2, y2])


def _common(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The intersection of two boxes over the area of the smaller one."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    smaller = min(np.prod(box[2:] - box[:2]) for box in (a, b))
    return float(np.prod(np.maximum(sides, 0)) / smaller) if smaller else 0.0


def _paste(scene: NDArray[Any], image: NDArray[Any], at: Window) -> None:
    """The brighter pixel of the two counts."""
    under = scene[:, *at]
    np.maximum(under, image, out=under)


def _checked_images(name: str, images: Any) -> NDArray[Any]:
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype.kind not in "fiu":
        raise ShapeError(
            f"expected images (N, C, H, W), real numbers; got {images.dtype} {images.shape}", name
        )
    return images
