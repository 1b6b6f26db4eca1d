"""Curves of a training run: loss, metrics and learning rate by epoch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from portacnn.errors import ArgumentError
from portacnn.plot.style import COLORS, figure, name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SETS = (("train", "training", "-", "o"), ("test", "test", "--", "s"))
_MOST_MARKERS = 40  # epochs; with more, markers would cover the line


def curves(
    history: Any, metrics: Sequence[str] | None = None, *, title: str = "", columns: int = 3
) -> "Figure":
    """Return the curves of a training run: a panel each for the loss, every metric, and the
    learning rate if it changes.

    Args:
        history: a ``Trainer``, its ``history``, or that of ``run_folder.read_history``.
        metrics: names of panels, such as ("loss", "accuracy", "lr"). None draws all.
        title: of the figure.
        columns: panels side by side.

    Raises:
        ArgumentError: if there is no such figure in the history, or nothing to draw.
        DependencyError: if matplotlib is missing.
    """
    values: Mapping[str, Sequence[Any]] = getattr(history, "history", history)
    panels = panels_of(values)
    if metrics is not None:
        if unknown := [each for each in metrics if each not in panels]:
            raise ArgumentError(f"the history has no {unknown[0]!r}; it has {', '.join(panels)}")
        panels = {each: panels[each] for each in metrics}
    elif len({*panels.get("lr", {}).get("train", ())}) == 1:
        del panels["lr"]
    if not panels:
        raise ArgumentError("the history has nothing to draw: no epoch is finished")
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns)
    drawn = figure(4.4 * columns + 0.2, 3.3 * rows + (0.4 if title else 0.0))
    cells = drawn.subplots(rows, columns, squeeze=False).flat
    for axes, (what, lines) in zip(cells, panels.items(), strict=False):
        _panel(axes, what, lines)
    for axes in drawn.axes[len(panels) :]:
        axes.set_axis_off()
    if title:
        drawn.suptitle(name(title, 100), fontsize="large")
    return drawn


def panels_of(history: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the figures that can be drawn, by what they are of, then by set: {"loss": {"train":
    [...], "test": [...]}, "lr": {"train": [...]}}. Values that are no numbers become NaN."""
    found: dict[str, dict[str, list[float]]] = {}
    for key, values in history.items():
        if not values or not all(isinstance(value, int | float | None) for value in values):
            continue
        part, _, what = key.partition("_")
        if key == "lr":
            part, what = "train", "lr"
        if part in ("train", "test") and what:
            numbers = [float("nan") if value is None else float(value) for value in values]
            found.setdefault(what, {})[part] = numbers
    if "lr" in found:
        found["lr"] = found.pop("lr")  # last
    return found


def label_of(what: str) -> str:
    """Return a figure's name for people: "top5_accuracy" -> "top5 accuracy"."""
    return {"lr": "learning rate"}.get(what, what.replace("_", " "))


def _panel(axes: "Axes", what: str, lines: Mapping[str, Sequence[float]]) -> None:
    from matplotlib.ticker import MaxNLocator

    for (part, label, style, marker), color in zip(_SETS, COLORS, strict=False):
        if part in lines:
            epochs = range(1, len(lines[part]) + 1)
            marked: dict[str, Any] = {}
            if len(epochs) <= _MOST_MARKERS:
                marked = {"marker": marker, "markersize": 4}
            axes.plot(epochs, lines[part], style, color=color, label=label, **marked)
    axes.set(xlabel="epoch", ylabel=name(label_of(what)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(loc="best", frameon=False)
