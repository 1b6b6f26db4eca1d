"""A contact sheet: queries, and beside each the images that a search found."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from portacnn.errors import ArgumentError
from portacnn.plot.style import COLORS, figure, name, show

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 1.0  # inches
_LONGEST = 14  # characters of a caption
_MARKS = ((COLORS[1], "✗", "--"), (COLORS[0], "✓", "-"))
"""Of wrong and right: the colour, the mark and the line."""


def neighbors(
    queries: Sequence[Any],
    found: Sequence[Sequence[Any]],
    *,
    captions: Sequence[Sequence[str]] | None = None,
    right: Any = None,
) -> "Figure":
    """Return a contact sheet: a row for each query, with the query and what was found for it.

    Args:
        queries: Q images (C, H, W).
        found: for each query its neighbours' images, nearest first. None is an image that is not
            there any more.
        captions: for each query its own text, then those of its neighbours: Q rows of k + 1.
        right: (Q, k), whether a neighbour is of the query's class. It gets a mark, a colour and a
            line that differ.

    Raises:
        ArgumentError: if there are no queries, or rows of other lengths.
        ShapeError: if an image has another shape.
        DependencyError: if matplotlib is missing.
    """
    rows, columns = len(queries), max((len(row) for row in found), default=0)
    for what, given in (("found", found), ("captions", captions), ("right", right)):
        if given is not None and (len(given) != rows or not rows):
            raise ArgumentError(f"expected a row of {what} for each of {rows} queries")
    drawn = figure(_CELL * (columns + 1), (_CELL + (0.22 if captions else 0.0)) * rows + 0.2)
    cells = drawn.subplots(rows, columns + 1, squeeze=False)
    for axes in cells.flat:
        axes.set(xticks=(), yticks=(), frame_on=False)
    for row, (query, near) in enumerate(zip(queries, found, strict=True)):
        for column, image in enumerate([query, *near]):
            axes = cells[row, column]
            if image is None:
                axes.text(0.5, 0.5, "missing", ha="center", fontsize=7, transform=axes.transAxes)
            else:
                show(axes, image)
            mark = ""
            if column and right is not None:
                color, mark, line = _MARKS[bool(right[row][column - 1])]
                axes.set_frame_on(True)
                for spine in axes.spines.values():
                    spine.set(color=color, linewidth=2.5, linestyle=line)
            text = name(captions[row][column], _LONGEST) if captions else ""
            if mark or text:
                axes.set_title(f"{mark} {text}".strip(), fontsize=7, pad=3)
    return drawn
