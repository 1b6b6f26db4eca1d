"""Images as points in a plane: the principal components of a layer's output."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from portacnn.arguments import whole
from portacnn.errors import ArgumentError
from portacnn.models import Model
from portacnn.plot.style import COLORS, MARKERS, class_names, figure, host, name
from portacnn.runtime import HostArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def principal_components(points: Any, count: int = 2) -> tuple[HostArray, HostArray]:
    """Return points (N, D) in their ``count`` directions of largest variance, (N, count), and the
    share of the variance in each.

    A component's sign is that of its largest coefficient, so that equal data give equal pictures.
    """
    values = host(points, "points")
    values = values.reshape(len(values), -1).astype(np.float64)
    centred = values - values.mean(axis=0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    directions = directions[:count]
    largest = np.abs(directions).argmax(axis=1)
    directions *= np.sign(directions[np.arange(len(directions)), largest])[:, None]
    placed = centred @ directions.T
    missing = count - placed.shape[1]
    total = float((scales**2).sum()) or 1.0
    shares = np.pad(scales**2 / total, (0, count))[:count]
    return np.pad(placed, ((0, 0), (0, missing))), shares


def embedding(
    model: Model,
    x: Any,
    t: Any = None,
    path: str | None = None,
    *,
    names: Sequence[str] | None = None,
    most: int = 2000,
) -> "Figure":
    """Return images as points in two dimensions: the principal components of ``model.features``.

    Args:
        x: images (N, *input_shape), or a ``Dataset``; then t is None.
        t: labels (N,), for colour and marker; None draws all points alike.
        path: of the layer; None takes the input of the last layer with parameters, i.e. what the
            classifier sees.
        names: of the classes; None takes the model's, or the Dataset's.
        most: of the images, the first.

    Raises:
        ArgumentError: if there are fewer than two images, or the network has one layer.
        StateError: as for ``Model.features``.
        DependencyError: if matplotlib is missing.
    """
    images, labels = (x.images, x.labels) if t is None and hasattr(x, "images") else (x, t)
    count = min(int(images.shape[0]), whole("most", most, 2))
    if count < 2:
        raise ArgumentError(f"an embedding needs at least two images, got {count}")
    path = _before_the_head(model) if path is None else path
    placed, shares = principal_components(model.features(images[:count, ...], path))
    drawn = figure(5.6, 4.4)
    axes = drawn.subplots()
    groups: list[tuple[str | None, HostArray]] = [(None, np.ones(count, bool))]
    if labels is not None:
        given = host(labels, "labels")[:count]
        given = given.argmax(axis=1) if given.ndim == 2 else given
        known = class_names(
            names or model.info.class_names or getattr(x, "class_names", None),
            int(given.max()) + 1 if model.output_shape[1:] else model.output_shape[0],
        )
        groups = [(known[int(c)], given == c) for c in np.unique(given)]
    for number, (label, chosen) in enumerate(groups):
        axes.scatter(
            placed[chosen, 0],
            placed[chosen, 1],
            s=14,
            alpha=0.75,
            linewidths=0,
            color=COLORS[number % len(COLORS)],
            marker=MARKERS[(number + number // len(COLORS)) % len(MARKERS)],
            label=None if label is None else name(label, 18),
        )
    axes.set(
        xlabel=f"first component ({shares[0]:.0%} of the variance)",
        ylabel=f"second component ({shares[1]:.0%})",
        title=f"{count:,} images at {name(path, 40)}",
    )
    if labels is not None and len(groups) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    return drawn


def _before_the_head(model: Model) -> str:
    """Return the path of the layer before the last one with parameters."""
    leaves = [n for n in model.walk() if not n.children and n.places]
    heads = [i for i, layer in enumerate(leaves) if layer.declared]
    if not heads or heads[-1] == 0:
        raise ArgumentError("the network has no layer before its last one; choose a path")
    return leaves[heads[-1] - 1].path
