"""Draw the figures of the tutorial: ``docs/conf.py`` calls ``draw`` before it builds the pages.

A page's blocks run in order, as a reader would run them. A function here draws one figure of the
page from the page's variables. It has the name of the file, drawn/NAME.png.
"""

import contextlib
import io
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from portacnn.plot.style import COLOR_MAP, COLORS, LINES

TUTORIAL = Path(__file__).resolve().parent / "tutorial"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def draw() -> None:
    """Draw the figures of each page that are missing, or older than the page or this file."""
    folder = TUTORIAL / "drawn"
    folder.mkdir(exist_ok=True)
    for name, figures in PAGES.items():
        page = TUTORIAL / f"{name}.md"
        changed = max(page.stat().st_mtime, Path(__file__).stat().st_mtime)
        files = {folder / f"{figure.__name__}.png": figure for figure in figures}
        if all(file.exists() and file.stat().st_mtime > changed for file in files):
            continue
        variables = SimpleNamespace(**run(page))
        for file, figure in files.items():
            figure(variables).savefig(file, dpi=100)


def run(page: Path) -> dict[str, Any]:
    """Run a page's blocks in an empty folder, and return its variables."""
    names: dict[str, Any] = {"__name__": page.stem}
    source = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(empty)
        try:
            exec(compile(source, str(page), "exec"), names)
        finally:
            os.chdir(before)
    return names


# --- convolution ----------------------------------------------------------------------------------


def corr2d(page: Any) -> Figure:
    figure, (left, right) = panels(2, 2.6)
    image(left, page.host(page.digit), "input")
    signed(right, page.host(page.edges), "output of (1, -1)")
    return figure


def learned(page: Any) -> Figure:
    figure, (left, right) = panels(2, 2.4, width=3.2)
    left.semilogy(page.losses, color=COLORS[0])
    labels(left, "step", "loss")
    for number, name in enumerate(("first element", "second element")):
        values = [guess[number] for guess in page.guesses]
        right.plot(values, LINES[number], color=COLORS[number], label=name)
    labels(right, "step", "kernel")
    right.legend(frameon=False)
    return figure


def im2col(page: Any) -> Figure:
    figure, cells = panels(3, 2.6, width=2.6)
    pixels, columns = page.host(page.x), page.host(page.columns)
    numbers(cells[0], pixels, "image")
    numbers(cells[1], pixels, "first patch and last patch")
    for (row, column), color in (((0, 0), COLORS[0]), ((1, 1), COLORS[1])):
        frame(cells[1], row, column, 2, 2, color)
    numbers(cells[2], columns, "im2col: a row for each patch")
    frame(cells[2], 0, 0, 1, 4, COLORS[0])
    frame(cells[2], 3, 0, 1, 4, COLORS[1])
    return figure


def stride(page: Any) -> Figure:
    cases = ((0, 1), (1, 1), (1, 2), (0, 3))
    figure, cells = panels(len(cases), 2.3)
    for cell, (padding, step) in zip(cells, cases, strict=True):
        y, _ = page.ops.conv2d(page.image, page.weight, stride=step, padding=padding)
        size = "x".join(str(side) for side in y.shape[2:])
        image(cell, page.host(y)[0, 0], f"padding {padding}, stride {step}: {size}")
    return figure


def channels(page: Any) -> Figure:
    figure, cells = panels(5, 2.1)
    image(cells[0], page.host(page.digit), "input")
    maps = page.host(page.maps)[0]
    names = ("right edges", "lower edges", "thin lines", "mean")
    for cell, values, name in zip(cells[1:], maps, names, strict=True):
        signed(cell, values, name)
    return figure


def pooling(page: Any) -> Figure:
    figure, cells = panels(5, 2.1)
    image(cells[0], page.host(page.digit), "input")
    for cell, (size, mode) in zip(
        cells[1:], ((2, "max"), (2, "avg"), (4, "max"), (4, "avg")), strict=True
    ):
        image(cell, page.host(page.pool2d(page.digit, size, mode)), f"{mode}, {size}x{size}")
    return figure


# --- network --------------------------------------------------------------------------------------


def gradient_check(page: Any) -> Figure:
    figure, (cell,) = panels(1, 2.8, width=4.5)
    cell.loglog(page.steps, page.errors, "o-", color=COLORS[0])
    labels(cell, "step h", "relative error")
    return figure


def by_hand(page: Any) -> Figure:
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    cells = figure.add_gridspec(2, 8)
    left = figure.add_subplot(cells[:, :4])
    left.plot(page.curve, color=COLORS[0])
    labels(left, "step", "loss")
    kernels = page.host(page.params["conv.weight"])
    for number, kernel in enumerate(kernels[:, 0]):
        signed(figure.add_subplot(cells[number // 4, 4 + number % 4]), kernel, "")
    return figure


# --- lenet ----------------------------------------------------------------------------------------


def lenet(page: Any) -> Figure:
    figure, (cell,) = panels(1, 2.8, width=4.5)
    for number, name in enumerate(("modern", "classic")):
        history = getattr(page, name).history["test_accuracy"]
        line, color = look(number)
        cell.plot(range(1, len(history) + 1), history, line, color=color, label=name)
    cell.set_ylim(0, 1)
    cell.set_xticks(range(1, len(history) + 1))
    labels(cell, "epoch", "test accuracy")
    cell.legend(frameon=False)
    return figure


def batch_norm(page: Any) -> Figure:
    figure, (cell,) = panels(1, 2.8, width=4.5)
    for number, (name, run) in enumerate(
        (("without batch norm", page.plain), ("with batch norm", page.normalized))
    ):
        line, color = look(number)
        cell.plot(run.train_loss_list, line, color=color, label=name)
    labels(cell, "step", "loss")
    cell.legend(frameon=False)
    return figure


def dropout(page: Any) -> Figure:
    figure, cells = panels(2, 2.8, width=3.6)
    runs = (("p = 0", page.without.history), ("p = 0.5", page.half.history))
    for number, (name, history) in enumerate(runs):
        for cell, key in zip(cells, ("train_accuracy", "test_accuracy"), strict=True):
            line, color = look(number)
            cell.plot(range(1, 31), history[key], line, color=color, label=name)
    for cell, name in zip(cells, ("training accuracy", "test accuracy"), strict=True):
        cell.set_ylim(0.5, 1)
        labels(cell, "epoch", name)
    cells[0].legend(frameon=False)
    return figure


# --- deep -----------------------------------------------------------------------------------------


def lrn(page: Any) -> Figure:
    figure, (cell,) = panels(1, 2.8, width=5.0)
    x = page.host(page.x)[0, :, 1, 1]
    y = page.host(page.by_op)[0, :, 1, 1] * 2.0**0.75  # without k, to compare
    places = np.arange(len(x))
    cell.bar(places - 0.2, x, 0.4, color=COLORS[0], label="before")
    cell.bar(places + 0.2, y, 0.4, color=COLORS[4], hatch="//", label="after, times k ** beta")
    labels(cell, "channel", "value at one pixel")
    cell.legend(frameon=False)
    return figure


def residual(page: Any) -> Figure:
    figure, (cell,) = panels(1, 3.0, width=5.0)
    for (blocks, shortcut), losses in page.runs.items():
        name = f"{2 * blocks + 2} layers, {'residual' if shortcut else 'plain'}"
        line, color = LINES[int(shortcut)], COLORS[blocks > 2]
        loss = np.convolve(losses, np.ones(5) / 5, mode="valid")
        cell.plot(loss, line, color=color, label=name)
    labels(cell, "step", "loss, mean of 5 steps")
    cell.legend(frameon=False)
    return figure


# --- what they share ------------------------------------------------------------------------------


def panels(count: int, height: float, width: float = 2.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(count * width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def image(axes: Axes, pixels: Any, title: str) -> None:
    axes.imshow(pixels, cmap="gray_r")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def signed(axes: Axes, pixels: Any, title: str) -> None:
    """Draw values of both signs: 0 is gray."""
    most = np.abs(pixels).max()
    axes.imshow(pixels, cmap="gray", vmin=-most, vmax=most)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def numbers(axes: Axes, values: Any, title: str) -> None:
    """Draw a small matrix with its values."""
    axes.imshow(np.asarray(values, dtype=float), cmap=COLOR_MAP, alpha=0.25)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.0f}", ha="center", va="center")
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()


def frame(axes: Axes, row: int, column: int, height: int, width: int, color: str) -> None:
    x, y = column - 0.44, row - 0.44
    across, down = width - 0.12, height - 0.12
    axes.plot(
        [x, x + across, x + across, x, x], [y, y, y + down, y + down, y], color=color, linewidth=2.5
    )


def labels(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def look(number: int) -> tuple[Any, str]:
    return LINES[number], COLORS[number]


PAGES: dict[str, list[Callable[[Any], Figure]]] = {
    "convolution": [corr2d, learned, im2col, stride, channels, pooling],
    "network": [gradient_check, by_hand],
    "lenet": [lenet, batch_norm, dropout],
    "deep": [lrn, residual],
}
"""The figures of each page of the tutorial."""
