"""What the network looked at: saliency, Grad-CAM, the receptive field of a unit."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from portacnn.errors import ShapeError
from portacnn.layers import receptive_field as field_of
from portacnn.models import Model
from portacnn.models import attribution as of
from portacnn.plot.style import COLOR_MAP, COLORS, class_names, figure, host, name, sample, show
from portacnn.runtime import Array, HostArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle


def saliency(model: Model, image: Array, target: int | None = None) -> "Figure":
    """Return the image beside how much each pixel changes the output of a class
    (``portacnn.models.saliency``).

    Args:
        image: (C, H, W), as the model takes it.
        target: the class; None takes the predicted one.

    Raises:
        ShapeError, LabelError, ...: as for ``portacnn.models.input_gradient``.
        DependencyError: if matplotlib is missing.
    """
    one, batch = sample(image)
    found = host(of.saliency(model, batch, target))[0]
    return _beside(one, found, "saliency", _title(model, batch, target))


def grad_cam(
    model: Model, image: Array, path: str | None = None, target: int | None = None
) -> "Figure":
    """Return the image beside the image with Grad-CAM over it (``portacnn.models.grad_cam``),
    resized by interpolation.

    Args:
        image: (C, H, W), as the model takes it.
        path: of a layer with output (C, H, W); None takes the last.
        target: the class; None takes the predicted one.

    Raises:
        ShapeError, LabelError, ...: as for ``portacnn.models.grad_cam``.
        DependencyError: if matplotlib is missing.
    """
    one, batch = sample(image)
    seen = host(of.grad_cam(model, batch, path, target))[0]
    if seen.ndim != 2:
        raise ShapeError(f"expected a layer with output (C, H, W), got {seen.shape} without C")
    path = of.last_map(model) if path is None else path
    title = f"{_title(model, batch, target)}, {path}"
    return _beside(one, resized(seen, one.shape[1:]), "Grad-CAM", title, over=True)


def receptive_field(
    model: Model, path: str, unit: Sequence[int] = (), image: Array | None = None
) -> "Figure":
    """Return the pixels that a unit of a layer reads, drawn on an image
    (``portacnn.layers.receptive_field``).

    Args:
        path: of a layer, as in ``summary``.
        unit: its index on each spatial axis; () takes the middle one.
        image: (C, H, W); None draws an empty one of the model's size.

    Raises:
        ArgumentError, ShapeError: as for ``portacnn.layers.receptive_field``.
        DependencyError: if matplotlib is missing.
    """
    field = field_of(model, path)
    if len(field.image) != 2:
        raise ShapeError(f"expected images (C, H, W), got samples {model.input_shape}")
    (top, bottom), (left, right) = field.pixels(unit)
    height, width = field.image
    drawn = figure(4.2, 4.2 * height / width + 0.6)
    axes = drawn.subplots()
    show(axes, np.full((height, width), 0.85) if image is None else sample(image)[0])
    for line, wide in (("white", 4.0), (COLORS[1], 2.0)):
        axes.add_patch(_rectangle(left, top, right - left, bottom - top, line, wide))
    axes.set(xticks=[], yticks=[])
    size, stride = ("x".join(f"{n:g}" for n in each) for each in (field.size, field.stride))
    at = ", ".join(map(str, unit or [n // 2 for n in field.units]))
    title = f"{name(path, 40)}, unit ({at})" if at else name(path, 40)
    axes.set_title(f"{title}\nfield {size}, stride {stride}", fontsize="medium")
    return drawn


def resized(image: HostArray, size: Sequence[int]) -> HostArray:
    """Return a map (H, W) of another size, by linear interpolation between the cells' centres."""
    for axis, n in enumerate(size):
        cells = image.shape[axis]
        places = np.clip((np.arange(n) + 0.5) * cells / n - 0.5, 0, cells - 1)
        first = np.minimum(places.astype(int), max(cells - 2, 0))
        share = (places - first).reshape((-1, 1) if axis == 0 else (1, -1))
        later = np.minimum(first + 1, cells - 1)
        image = (1 - share) * image.take(first, axis) + share * image.take(later, axis)
    return image


def _rectangle(
    x: float, y: float, width: float, height: float, color: str, wide: float
) -> "Rectangle":
    from matplotlib.patches import Rectangle as Made

    return Made((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=color, linewidth=wide)


def _title(model: Model, batch: Array, target: int | None) -> str:
    outputs = host(model.predict(batch))[0]
    if outputs.ndim > 1:
        outputs = outputs.reshape(len(outputs), -1).sum(axis=1)
    index = int(np.argmax(outputs)) if target is None else target
    known = class_names(model.info.class_names, len(outputs))[index]
    return f"class {name(known)}" if target is not None else f"predicted class {name(known)}"


def _beside(
    image: Array, found: HostArray, label: str, title: str, *, over: bool = False
) -> "Figure":
    height, width = image.shape[1:]
    drawn = figure(6.4, 2.7 * height / width + 0.6)
    left, right = drawn.subplots(1, 2)
    show(left, image)
    if over:
        show(right, image)
    top = 1.0 if over else float(found.max()) or 1.0
    mapped = right.imshow(found, cmap=COLOR_MAP, vmin=0.0, vmax=top, alpha=0.6 if over else 1.0)
    for axes in (left, right):
        axes.set_axis_off()
    drawn.colorbar(mapped, ax=[left, right], label=label, shrink=0.8)
    drawn.suptitle(title, fontsize="medium")
    return drawn
