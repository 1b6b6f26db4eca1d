"""A training run in a notebook: its settings, the curves as a small picture, and the last
epochs."""

from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any

_WIDTH, _HEIGHT = 300, 150  # of one picture, in pixels
_LEFT, _TOP, _BOTTOM = 52, 22, 20  # margins for labels
_LAST = 5  # epochs in the table
_POINTS = 300  # of a curve, at most
# two colours that differ for everybody, on light and on dark pages; the second line is dashed too
_LINES = {"train": ("#0a7cc4", ""), "test": ("#d55e00", ' stroke-dasharray="5 3"')}


def page(settings: str, history: Mapping[str, Sequence[Any]]) -> str:
    """Return a training run as HTML.

    Args:
        settings: a line of text.
        history: ``Trainer.history``.
    """
    numbers = {
        name: [float(value) for value in values]
        for name, values in history.items()
        if all(isinstance(value, int | float) for value in values)
    }
    epochs = max(map(len, numbers.values()), default=0)
    parts = [f"<p>{escape(settings)}</p>"]
    if epochs > 1:
        metrics = dict.fromkeys(_parts(name)[1] for name in numbers if _parts(name)[0] in _LINES)
        parts += [_picture(metric, numbers) for metric in metrics]
    return "".join(parts) + (_table(numbers, epochs) if epochs else "")


def _parts(name: str) -> tuple[str, str]:
    which, _, metric = name.partition("_")
    return which, metric


def _picture(metric: str, numbers: Mapping[str, list[float]]) -> str:
    """Return the curves of a metric over the epochs as SVG, of the training and the test set."""
    curves = {which: numbers.get(f"{which}_{metric}", []) for which in _LINES}
    seen = [value for curve in curves.values() for value in curve if isfinite(value)]
    if not seen:
        return ""
    low, high, epochs = min(seen), max(seen), max(map(len, curves.values()))
    right, bottom = _WIDTH - 8, _HEIGHT - _BOTTOM

    def place(epoch: int, value: float) -> str:
        x = _LEFT + (right - _LEFT) * epoch / max(1, epochs - 1)
        y = bottom - (bottom - _TOP) * ((value - low) / (high - low) if high > low else 0.5)
        return f"{x:.1f},{y:.1f}"

    drawn, labels = [], []
    for number, (which, curve) in enumerate(curves.items()):
        colour, dashes = _LINES[which]
        step = max(1, len(curve) // _POINTS)
        points = [
            place(epoch, value)
            for epoch, value in enumerate(curve)
            if isfinite(value) and (epoch % step == 0 or epoch == len(curve) - 1)
        ]
        if points:
            drawn.append(
                f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" '
                f'stroke-width="2"{dashes}/>'
            )
            labels.append(_label(right - 50 * (1 - number), 12, which, "end", colour))
    name = escape(metric.replace("_", " "))
    texts = [
        _label(_LEFT, 12, name, "start"),
        _label(_LEFT - 5, _TOP + 8, f"{high:.3g}", "end"),
        _label(_LEFT - 5, bottom, f"{low:.3g}", "end"),
        _label(_LEFT, _HEIGHT - 5, "1", "start"),
        _label(right, _HEIGHT - 5, f"epoch {epochs}", "end"),
    ]
    return (
        f'<svg role="img" aria-label="{name} of each epoch" width="{_WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {_WIDTH} {_HEIGHT}" style="font:12px sans-serif;margin-right:16px">'
        f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="currentColor" '
        f'stroke-opacity="0.4"/>{"".join(drawn + labels + texts)}</svg>'
    )


def _label(x: int, y: int, text: str, anchor: str, colour: str = "currentColor") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{text}</text>'


def _table(numbers: Mapping[str, list[float]], epochs: int) -> str:
    """Return the last epochs' figures as a table."""
    names = [name for name, values in numbers.items() if len(values) == epochs]
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in ("epoch", *names))
    body = "".join(
        f"<tr><td>{epoch + 1}</td>"
        f"{''.join(f'<td>{_figure(numbers[name][epoch])}</td>' for name in names)}</tr>"
        for epoch in range(max(0, epochs - _LAST), epochs)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"
