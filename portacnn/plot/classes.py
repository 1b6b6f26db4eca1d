"""Where a classifier errs: the confusion matrix, and the worst errors with their images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from portacnn.data.labels import class_indices
from portacnn.errors import ArgumentError
from portacnn.losses.outputs import scores
from portacnn.models import Model
from portacnn.plot.style import COLOR_MAP, figure, grid, host, name, show
from portacnn.runtime import HostArray
from portacnn.text import class_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BATCH = 256
_MOST_COUNTS = 30  # classes; with more, numbers in the cells would not be readable


class Classified(NamedTuple):
    """What a model says about labelled images.

    Attributes:
        labels, predicted: int64 (N,); predicted is -1 if an output is NaN.
        probabilities: (N, classes).
        names: of the classes.
    """

    labels: HostArray
    predicted: HostArray
    probabilities: HostArray
    names: list[str]

    @property
    def confusion(self) -> HostArray:
        """The number of images of class i (row) that are predicted as class j (column), int64."""
        classes = len(self.names)
        known = self.predicted >= 0
        cells = classes * self.labels[known] + self.predicted[known]
        return np.bincount(cells, minlength=classes**2).reshape(classes, classes)

    def worst(self, count: int) -> HostArray:
        """Return the indices of the misclassified images, those first in which the model was
        surest of its error."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        sure = np.nan_to_num(self.probabilities[wrong].max(axis=1), nan=2.0)
        return wrong[np.argsort(-sure, kind="stable")][:count]


def classified(
    model: Model, x: Any, t: Any = None, names: Sequence[str] | None = None
) -> Classified:
    """Return what a model says about images, read a batch at a time.

    Args:
        x: images (N, *input_shape), or a ``Dataset``; then t is None.
        t: labels (N,), or one-hot.
        names: of the classes; None takes the model's, or the Dataset's.

    Raises:
        ArgumentError: if there are no images or no labels.
        LabelError: if labels do not fit.
        ShapeError: if the model is not a classifier with one output for each class.
    """
    images, labels = (x.images, x.labels) if t is None and hasattr(x, "images") else (x, t)
    count = int(images.shape[0])
    if labels is None or count == 0:
        raise ArgumentError("expected images with labels: arrays x and t, or a Dataset")
    classes = model.classes
    labels = class_indices(host(labels, "labels"), count, classes, "labels")
    parts, home = [], model.home
    with home.active():
        for _, _, y in model.outputs(images, _BATCH):
            parts.append(home.to_host(scores(y, "multiclass")))
    found = np.concatenate(parts)
    whole = np.isfinite(found).all(axis=1)
    names = names or model.info.class_names or getattr(x, "class_names", None)
    predicted = np.where(whole, np.argmax(np.nan_to_num(found), axis=1), -1)
    return Classified(labels, predicted, found, class_names(names, classes))


def confusion_matrix(
    model: Model,
    x: Any,
    t: Any = None,
    *,
    names: Sequence[str] | None = None,
    normalize: bool = True,
) -> "Figure":
    """Return the confusion matrix: a row for each true class, a column for each predicted one.

    Args:
        model, x, t, names: see ``classified``.
        normalize: colour by the share of a class's images; False by their number. The cells say
            the number in both cases, up to 30 classes.

    Raises:
        ArgumentError, LabelError, ShapeError: see ``classified``.
        DependencyError: if matplotlib is missing.
    """
    found = classified(model, x, t, names)
    counts, classes = found.confusion, len(found.names)
    values = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1) if normalize else counts
    side = min(max(3.2, 0.42 * classes + 1.6), 9.0)
    drawn = figure(side + 1.0, side)
    axes = drawn.subplots()
    top = 1.0 if normalize else max(float(values.max()), 1.0)
    mapped = axes.imshow(values, cmap=COLOR_MAP, vmin=0.0, vmax=top)
    axes.set(xlabel="predicted class", ylabel="true class")
    drawn.colorbar(mapped, label="share of the class" if normalize else "images", shrink=0.8)
    if classes <= _MOST_COUNTS:
        labels = [name(each, 18) for each in found.names]
        long = any(len(label) > 3 for label in labels)
        turned: dict[str, Any] = {}
        if long:
            turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(classes), labels, **turned)
        axes.set_yticks(range(classes), labels)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                color = "black" if values[row, column] > top / 2 else "white"
                axes.text(
                    column, row, str(count), ha="center", va="center", color=color, fontsize=7
                )
    return drawn


def worst_errors(
    model: Model,
    x: Any,
    t: Any = None,
    *,
    names: Sequence[str] | None = None,
    most: int = 16,
    columns: int = 4,
) -> "Figure":
    """Return the misclassified images in which the model was surest, with both class names and the
    probability of the wrong one.

    Args:
        model, x, t, names: see ``classified``.
        most: of the images to draw.

    Raises:
        ArgumentError, LabelError, ShapeError: see ``classified``.
        DependencyError: if matplotlib is missing.
    """
    found = classified(model, x, t, names)
    images = x.images if t is None else x
    worst = found.worst(most)
    if not len(worst):
        drawn = figure(4.0, 1.0)
        drawn.text(0.5, 0.5, f"no errors in {len(found.labels):,} images", ha="center")
        return drawn
    drawn, cells = grid(len(worst), columns, 1.5, 0.5)
    for axes, index in zip(cells, worst.tolist(), strict=True):
        show(axes, images[index, ...])
        predicted = int(found.predicted[index])
        said = "NaN"
        if predicted >= 0:
            said = f"{name(found.names[predicted], 16)} ({found.probabilities[index].max():.0%})"
        true = name(found.names[int(found.labels[index])], 16)
        axes.set_title(f"is {true}\nsays {said}", fontsize="small")
    return drawn
