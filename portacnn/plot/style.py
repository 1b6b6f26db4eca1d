"""What all pictures share: the figure, colours, images as matplotlib shows them, text."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from portacnn.errors import ArrayError, DependencyError, ShapeError
from portacnn.runtime import Array, HostArray, backend_of
from portacnn.text import cut, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A7A00", "#000000"),
)
"""Okabe and Ito's colours, with a darker yellow, which is readable on white."""
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
COLOR_MAP = "cividis"
DPI = 120
_LONGEST = 24  # characters of a class name


def figure(width: float, height: float) -> "Figure":
    """Return an empty figure, in inches. Raises DependencyError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError(
            f'pictures need matplotlib: {error}; run: pip install "portacnn[plot]"'
        ) from None
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def grid(count: int, columns: int, cell: float, more: float = 0.0) -> tuple["Figure", list["Axes"]]:
    """Return a figure of ``count`` square cells without axes, and the cells.

    Args:
        cell: width in inches.
        more: height for the title of each cell.
    """
    columns = max(1, min(columns, count))
    rows = ceil(count / columns)
    made = figure(max(columns * cell, 2.2), rows * (cell + more) + 0.4)
    cells = list(made.subplots(rows, columns, squeeze=False).flat)
    for each in cells:
        each.set_axis_off()
    return made, cells[:count]


def name(text: object, longest: int = _LONGEST) -> str:
    """Return a class name as matplotlib shows it: short, and without its mathematics."""
    return cut(printable(str(text)), longest).replace("$", r"\$")


def host(array: Any, what: str = "array") -> HostArray:
    """Return an array of any library, or a list, as NumPy's. Raises ArrayError."""
    if isinstance(array, list | tuple | int | float):
        return np.asarray(array)
    try:
        return backend_of(array).to_host(array)
    except ArrayError as error:
        error.message = f"{what}: {error.message}"
        raise


def shown(image: Array) -> HostArray:
    """Return an image (C, H, W) or (H, W) as matplotlib takes it: (H, W), or (H, W, 3) in 0..1.

    uint8 images and those within 0..1 keep their brightness; others are scaled to their own range.
    Of other numbers of channels than 1 and 3, their mean is shown.
    """
    found = host(image, "image")
    if found.ndim not in (2, 3):
        raise ShapeError(f"expected an image (C, H, W) or (H, W), got shape {found.shape}")
    if found.dtype == np.uint8:
        found = found / 255.0
    found = np.nan_to_num(found.astype(np.float64))
    low, high = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
    if low < 0.0 or high > 1.0:
        found = (found - low) / max(high - low, 1e-12)
    if found.ndim == 2:
        return found
    if found.shape[0] == 3:
        return found.transpose(1, 2, 0)
    return found.mean(axis=0)


def show(axes: "Axes", image: Array) -> None:
    """Draw an image into a cell, gray images from black to white."""
    axes.imshow(shown(image), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")


def sample(image: Any) -> tuple[Any, Any]:
    """Return one image (C, H, W) from an image or a batch of one, and the batch (1, C, H, W)."""
    if (
        not hasattr(image, "ndim")
        or image.ndim not in (3, 4)
        or (image.ndim == 4 and image.shape[0] != 1)
    ):
        shape = getattr(image, "shape", type(image).__name__)
        raise ShapeError(f"expected one image (C, H, W), got {shape}")
    return (image, image[None, ...]) if image.ndim == 3 else (image[0, ...], image)


def class_names(names: Sequence[str] | None, count: int) -> list[str]:
    """Return a name for each class: those that are known, or numbers."""
    return (
        [str(n) for n in names] if names and len(names) == count else list(map(str, range(count)))
    )
