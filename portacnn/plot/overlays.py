"""What a network found in an image, drawn over it: classes of pixels, and boxes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from portacnn.errors import ShapeError
from portacnn.plot.style import COLORS, figure, host, name, sample, show
from portacnn.runtime import Array
from portacnn.text import class_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++", "ooo", "---")


def segmentation(
    image: Array,
    mask: Any,
    *,
    names: Sequence[str] | None = None,
    background: int | None = 0,
    alpha: float = 0.45,
) -> "Figure":
    """Return an image beside the same with the classes of its pixels over it.

    Args:
        image: (C, H, W).
        mask: (H, W), the class of each pixel, such as ``predictions``; -1 and below is no class.
            Or outputs (K, H, W), of which the largest is taken.
        names: of the classes, for the legend.
        background: a class that is not coloured, or None.
        alpha: opacity of the colours.

    Raises:
        ShapeError: if the mask is not of the image's size.
        DependencyError: if matplotlib is missing.
    """
    one, _ = sample(image)
    found = host(mask, "mask")
    found = found.argmax(axis=0) if found.ndim == 3 else found
    if found.shape != tuple(one.shape[1:]):
        raise ShapeError(f"expected a mask {tuple(one.shape[1:])}, got {found.shape}")
    from matplotlib.colors import to_rgb

    there = [int(c) for c in np.unique(found) if c >= 0 and c != background]
    drawn, (left, right) = _pair(one)
    over = np.zeros((*found.shape, 4))
    for index in there:
        over[found == index] = (*to_rgb(_color(index)), alpha)
    show(left, one)
    show(right, one)
    right.imshow(over, interpolation="nearest")
    for index in there:  # an outline and a hatch tell classes apart without colours
        levels = (found == index).astype(float)
        if 0.0 < levels.mean() < 1.0:
            right.contour(levels, levels=[0.5], colors=[_color(index)], linewidths=1.2)
            hatched = right.contourf(
                levels, levels=[0.5, 1.5], colors="none", hatches=[_HATCHES[index % len(_HATCHES)]]
            )
            hatched.set_edgecolor(_color(index))
            hatched.set_linewidth(0.0)
    known = class_names(names, max([len(names or ()), *(i + 1 for i in there), 1]))
    _legend(drawn, [(name(known[i]), _color(i), _HATCHES[i % len(_HATCHES)]) for i in there])
    return drawn


def boxes(
    image: Array,
    found: Any,
    labels: Any = None,
    scores: Any = None,
    *,
    truth: Any = None,
    names: Sequence[str] | None = None,
    axes: "Axes | None" = None,
) -> "Figure":
    """Return an image with boxes drawn over it.

    Args:
        image: (C, H, W).
        found: boxes (M, 4): left, top, right, bottom in pixels.
        labels: class of each box (M,), or None.
        scores: of each box (M,), or None.
        truth: boxes (K, 4) that are right, drawn dashed in black and white, or None.
        names: of the classes.
        axes: where to draw, in a figure of yours; None makes a figure.

    Raises:
        ShapeError: if boxes are not (M, 4), or there are not as many labels or scores.
        DependencyError: if matplotlib is missing.
    """
    one, _ = sample(image)
    placed = _boxes(found, "found")
    classes = None if labels is None else host(labels, "labels").astype(int)
    sure = None if scores is None else host(scores, "scores")
    for what, values in (("labels", classes), ("scores", sure)):
        if values is not None and values.shape != (len(placed),):
            raise ShapeError(f"expected {what} ({len(placed)},), got shape {values.shape}")
    count = 0 if classes is None or not len(classes) else int(classes.max()) + 1
    known = class_names(names, max(count, len(names or ())))
    height, width = one.shape[1:]
    if axes is None:
        axes = figure(5.0, 5.0 * height / width + 0.2).subplots()
    axes.set_axis_off()
    show(axes, one)
    for box in _boxes([] if truth is None else truth, "truth"):
        _box(axes, box, "white", 2.5, "-")
        _box(axes, box, "black", 1.5, "--")
    for number, box in enumerate(placed):
        index = 0 if classes is None else int(classes[number])
        _box(axes, box, "white", 3.2, "-")
        _box(axes, box, _color(index), 2.0, "-")
        words = [] if classes is None else [name(known[index])]
        words += [] if sure is None else [f"{sure[number]:.0%}"]
        if words:
            above = box[1] > 0.08 * height
            axes.text(
                box[0],
                box[1] if above else box[3],
                " ".join(words),
                va="bottom" if above else "top",
                fontsize="small",
                color="white",
                clip_on=True,
                bbox={"facecolor": _color(index), "edgecolor": "white", "pad": 1.5, "lw": 0.5},
            )
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    return cast("Figure", axes.figure)


def _boxes(given: Any, what: str) -> Any:
    found = host(given, what).astype(float)
    found = found.reshape(0, 4) if not found.size else found
    if found.ndim != 2 or found.shape[1] != 4:
        raise ShapeError(
            f"{what} must be boxes (M, 4): left, top, right, bottom; got shape {found.shape}"
        )
    return found


def _box(axes: "Axes", box: Any, color: str, wide: float, style: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    axes.add_patch(
        Rectangle(
            (left - 0.5, top - 0.5),
            right - left,
            bottom - top,
            fill=False,
            edgecolor=color,
            linewidth=wide,
            linestyle=style,
        )
    )


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _pair(image: Array) -> tuple["Figure", list["Axes"]]:
    height, width = image.shape[1:]
    drawn = figure(6.2, 3.0 * height / width + 0.7)
    cells = list(drawn.subplots(1, 2))
    for axes in cells:
        axes.set_axis_off()
    return drawn, cells


def _legend(drawn: "Figure", entries: list[tuple[str, str, str]]) -> None:
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=color, hatch=hatch, label=label, edgecolor="white")
        for label, color, hatch in entries
    ]
    if patches:
        drawn.legend(
            handles=patches, loc="outside lower center", ncols=min(4, len(patches)), frameon=False
        )
