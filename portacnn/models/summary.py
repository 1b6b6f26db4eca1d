"""Count a network's parameters, multiply-adds and memory per layer, as rows and as a table."""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from math import prod
from typing import NamedTuple

from portacnn.layers import Graph, Layer, Recompute, Sequential
from portacnn.layers.base import Shape
from portacnn.text import printable

_BYTES = {"float32": 4, "float64": 8}
_HEAD = ("layer", "class", "output", "parameters", "multiply-adds", "activations")


class Row(NamedTuple):
    """One layer. Multiply-adds and the bytes of its output are for one sample."""

    path: str
    kind: str
    output: Shape
    parameters: int
    multiply_adds: int
    output_bytes: int
    shared: bool = False  # also at an earlier path, which counts its parameters
    frozen: int = 0  # number of frozen parameters


def rows(network: Layer, input_shape: Sequence[int]) -> list[Row]:
    """Return a row for every layer that computes something, in the order in which they run.

    A block precedes its inner layers. The network is planned for samples of ``input_shape`` and
    then restored.

    Raises:
        ShapeError: if the network does not take such samples.
    """
    with network.planned(input_shape):
        return list(_rows(network, Counter()))


def _rows(layer: Layer, seen: Counter[Layer]) -> Iterator[Row]:
    """Yield the rows of a layer and all below it, in one of its places."""
    number = seen[layer]
    seen[layer] += 1
    if number >= len(layer.places):  # a layer that is not run by its container
        return
    path, layer.input_shape, layer.output_shape = layer.places[number]
    # their output is their last layer's
    if not isinstance(layer, Sequential | Graph | Recompute):
        yield Row(
            path,
            type(layer).__name__,
            layer.output_shape,
            0 if number else layer.parameter_count,
            layer.multiply_adds(),
            prod(layer.output_shape) * _BYTES[layer.dtype],
            number > 0,
            0 if number else _frozen(layer),
        )
    for child in layer.children.values():
        yield from _rows(child, seen)


def _frozen(layer: Layer) -> int:
    return sum(prod(layer.declared[n].shape) for n in layer.frozen & layer.declared.keys())


class Table(NamedTuple):
    """``rows`` as text: two lines of titles, cells by line, totals, and a note on frozen
    parameters."""

    titles: tuple[str, str]
    lines: list[tuple[str, ...]]
    total: tuple[str, ...]
    note: str


def _table(network: Layer, input_shape: Sequence[int], batch_size: int) -> Table:
    """Return ``rows`` as text, with the activations of a whole batch."""
    found = rows(network, input_shape)
    lines: list[tuple[str, ...]] = [
        (
            printable(r.path),
            r.kind,
            _by(r.output),
            "shared" if r.shared else f"{r.parameters:,}",
            f"{r.multiply_adds:,}",
            _memory(batch_size * r.output_bytes),
        )
        for r in found
    ]
    total = (
        "total",
        "",
        "",
        f"{sum(r.parameters for r in found):,}",
        f"{sum(r.multiply_adds for r in found):,}",
        _memory(batch_size * sum(r.output_bytes for r in found)),
    )
    title = f"{type(network).__name__}, samples {_by(input_shape)}, {network.dtype}"
    counted = f"multiply-adds of one sample, activations of a batch of {batch_size}"
    frozen = sum(r.frozen for r in found)
    trainable = sum(r.parameters for r in found) - frozen
    note = f"trainable parameters: {trainable:,}; frozen: {frozen:,}" if frozen else ""
    return Table((title, counted), lines, total, note)


def table(network: Layer, input_shape: Sequence[int], batch_size: int) -> str:
    """Return ``rows`` as text, with the activations of a whole batch and totals at the end."""
    titles, lines, total, note = _table(network, input_shape, batch_size)
    widths = [max(map(len, column)) for column in zip(_HEAD, *lines, total, strict=True)]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(
        [
            *titles,
            *_aligned([_HEAD], widths),
            rule,
            *_aligned(lines, widths),
            rule,
            *_aligned([total], widths),
            *([note] if note else []),
        ]
    )


def html_table(network: Layer, input_shape: Sequence[int]) -> str:
    """Return ``rows`` as an HTML table for a notebook, with totals at the end."""
    titles, lines, total, note = _table(network, input_shape, 1)
    head, *body, foot = (
        "".join(
            f'<{tag} style="text-align:{"left" if i < 3 else "right"}">{escape(cell)}</{tag}>'
            for i, cell in enumerate(cells)
        )
        for tag, cells in (("th", _HEAD), *(("td", line) for line in lines), ("th", total))
    )
    return (
        f"<p>{escape('; '.join(titles))}</p><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(f'<tr>{cells}</tr>' for cells in body)}</tbody>"
        f"<tfoot><tr>{foot}</tr></tfoot></table>{f'<p>{escape(note)}</p>' if note else ''}"
    )


def _aligned(lines: Sequence[tuple[str, ...]], widths: list[int]) -> Iterator[str]:
    """Yield lines with text aligned left and numbers right."""
    for line in lines:
        cells = [
            c.ljust(w) if i < 3 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _memory(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
