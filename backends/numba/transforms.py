"""The transforms of Winograd's convolution F(2x2, 3x3) as vector instructions.

Each transforms a run of tiles at once: one vector holds the same element of neighbouring tiles.
The even and the odd columns of a row are apart (``parity.py``), so that these elements are
contiguous.

The matrices are those of Lavin and Gray, 2015 ("Fast algorithms for convolutional neural
networks", section 4.1).
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from portacnn.backends.numba.emit import Emit

_Values = list[Any]


def _both_ways(columns: Sequence[_Values], once: Callable[[_Values], _Values]) -> list[_Values]:
    """Apply ``once`` to the columns of a matrix, then to the rows of the result."""
    rows = list(zip(*map(once, columns), strict=True))
    return [once(list(row)) for row in rows]


def _read(
    e: Emit, source: Any, rows: Sequence[Any], columns: Sequence[Any], i: Any, mask: Any
) -> list[_Values]:
    """Return a vector of each element of a tile, column by column. ``rows`` and ``columns`` are the
    distances of the tile's rows and columns."""
    return [
        [e.load(e.ahead(source, _sum(e, row, column, i)), mask) for row in rows]
        for column in columns
    ]


def _write(
    e: Emit, values: list[_Values], target: Any, rows: Sequence[Any], columns: Sequence[Any],
    i: Any, mask: Any,
) -> None:  # fmt: skip
    """Store the elements of a tile, given row by row; arguments as for ``_read``."""
    for line, row in zip(values, rows, strict=True):
        for value, column in zip(line, columns, strict=True):
            e.store(value, e.ahead(target, _sum(e, row, column, i)), mask)


def _sum(e: Emit, *offsets: Any) -> Any:
    return reduce(e.builder.add, offsets)


def _times(e: Emit, step: Any, count: int) -> list[Any]:
    """Return 0, step, 2 step, ..."""
    return [e.builder.mul(step, e.number(k)) for k in range(count)]


def _places(e: Emit, place: Any) -> tuple[list[Any], list[Any]]:
    """Return the distances of the rows and columns of a transform, whose 16 parts are at distance
    ``place``."""
    return _times(e, e.builder.mul(place, e.number(4)), 4), _times(e, place, 4)


@intrinsic
def input_tiles(
    typing: Any, x: Any, at_x: Any, row: Any, phase: Any, step: Any, v: Any, at_v: Any, place: Any,
    length: Any,
) -> Any:  # fmt: skip
    """Write v[p] = (B^T d B)[p], p < 16, for a run of tiles d (4, 4).

    Args:
        x, at_x: the rows of the tiles, at distance ``row``. A row has its even columns, and at
            distance ``phase`` its odd columns; the next column of one parity is at ``step``.
        v, at_v: the result, whose 16 parts are at distance ``place``.
    """
    arguments = (x, at_x, row, phase, step, v, at_v, place, length)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x_, at_x_, row_, phase_, step_, v_, at_v_, place_, length_ = values
        e = Emit(context, builder, x)
        source, target = e.pointer(x, x_, at_x_), e.pointer(v, v_, at_v_)
        columns = [e.number(0), phase_, step_, builder.add(phase_, step_)]

        def once(d: _Values) -> _Values:
            return [
                builder.fsub(d[0], d[2]),
                builder.fadd(d[1], d[2]),
                builder.fsub(d[2], d[1]),
                builder.fsub(d[1], d[3]),
            ]

        def body(i: Any, mask: Any) -> None:
            read = _read(e, source, _times(e, row_, 4), columns, i, mask)
            _write(e, _both_ways(read, once), target, *_places(e, place_), i, mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(*arguments), emit


@intrinsic
def output_tiles(
    typing: Any, m: Any, at_m: Any, place: Any, y: Any, at_y: Any, row: Any, phase: Any, length: Any
) -> Any:
    """Write the tiles y (2, 2) = A^T m A for a run of tiles m (4, 4), the layouts as for
    ``input_tiles``.
    """
    arguments = (m, at_m, place, y, at_y, row, phase, length)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        m_, at_m_, place_, y_, at_y_, row_, phase_, length_ = values
        e = Emit(context, builder, m)
        source, target = e.pointer(m, m_, at_m_), e.pointer(y, y_, at_y_)

        def once(m: _Values) -> _Values:
            return [
                builder.fadd(builder.fadd(m[0], m[1]), m[2]),
                builder.fsub(builder.fsub(m[1], m[2]), m[3]),
            ]

        def body(i: Any, mask: Any) -> None:
            read = _read(e, source, *_places(e, place_), i, mask)
            into = _times(e, row_, 2), [e.number(0), phase_]
            _write(e, _both_ways(read, once), target, *into, i, mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(*arguments), emit


@intrinsic
def gradient_tiles(
    typing: Any, dy: Any, at_dy: Any, row: Any, phase: Any, v: Any, at_v: Any, place: Any,
    length: Any,
) -> Any:  # fmt: skip
    """Write v (4, 4) = A dy A^T for a run of tiles dy (2, 2): the adjoint of ``output_tiles``."""
    arguments = (dy, at_dy, row, phase, v, at_v, place, length)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        dy_, at_dy_, row_, phase_, v_, at_v_, place_, length_ = values
        e = Emit(context, builder, dy)
        source, target = e.pointer(dy, dy_, at_dy_), e.pointer(v, v_, at_v_)

        def once(d: _Values) -> _Values:
            return [d[0], builder.fadd(d[0], d[1]), builder.fsub(d[0], d[1]), builder.fneg(d[1])]

        def body(i: Any, mask: Any) -> None:
            read = _read(e, source, _times(e, row_, 2), [e.number(0), phase_], i, mask)
            _write(e, _both_ways(read, once), target, *_places(e, place_), i, mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(*arguments), emit


@intrinsic
def kernel_tiles(
    typing: Any, weight: Any, at_weight: Any, u: Any, at_u: Any, place: Any, length: Any
) -> Any:
    """Write u (4, 4) = G g G^T for ``length`` kernels g (3, 3) that follow each other in memory."""
    arguments = (weight, at_weight, u, at_u, place, length)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        weight_, at_weight_, u_, at_u_, place_, length_ = values
        e = Emit(context, builder, weight)
        source, target = e.pointer(weight, weight_, at_weight_), e.pointer(u, u_, at_u_)
        half = ir.Constant(e.vector, [0.5] * e.lanes)

        def once(g: _Values) -> _Values:
            ends = builder.fmul(builder.fadd(g[0], g[2]), half)
            middle = builder.fmul(g[1], half)
            return [g[0], builder.fadd(ends, middle), builder.fsub(ends, middle), g[2]]

        def body(i: Any, mask: Any) -> None:
            here = e.ahead(source, builder.mul(i, e.number(9)))
            read = [
                [e.gather(e.ahead(here, 3 * a + b), 9, mask) for a in range(3)] for b in range(3)
            ]
            _write(e, _both_ways(read, once), target, *_places(e, place_), i, mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(*arguments), emit
