"""Draw the curves of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(history: Mapping[str, Sequence[Any]], title: str, path: Path) -> None:
    """Write a metric of both sets by epoch as a PNG: the first one, or the loss without metrics.

    Needs matplotlib.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = {
        name: values
        for name, values in history.items()
        if name.startswith(("train_", "test_"))
        and all(isinstance(value, int | float) for value in values)
    }
    names = [name.removeprefix("train_") for name in numbers if name.startswith("train_")]
    metric = next((name for name in names if name != "loss"), "loss")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, marker in (("train", "training", "o"), ("test", "test", "s")):
        if values := numbers.get(f"{key}_{metric}"):
            axes.plot(range(1, len(values) + 1), values, marker=marker, markersize=4, label=label)
    axes.set(xlabel="epoch", ylabel=metric.replace("_", " "), title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(loc="best")
    figure.savefig(path, dpi=120)
