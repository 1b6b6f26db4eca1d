"""The transforms of Winograd's convolution F(2x2, 3x3) as vector instructions.

Each transforms a run of tiles at once: one vector holds the same element of neighbouring tiles.
``split_run`` and ``merge_run`` separate the even from the odd columns of a row and join them again,
so that these elements are contiguous.

The matrices are those of Lavin and Gray, 2015 ("Fast algorithms for convolutional neural
networks", section 4.1).
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from portacnn.backends.numba.emit import WIDTH, Emit

_Values = list[Any]


def _both_ways(columns: Sequence[_Values], once: Callable[[_Values], _Values]) -> list[_Values]:
    """Apply ``once`` to the columns of a matrix, then to the rows of the result."""
    rows = list(zip(*map(once, columns), strict=True))
    return [once(list(row)) for row in rows]


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
            read = [
                [
                    e.load(
                        e.ahead(
                            e.ahead(source, builder.add(column, builder.mul(row_, e.number(a)))), i
                        ),
                        mask,
                    )
                    for a in range(4)
                ]
                for column in columns
            ]
            for a, line in enumerate(_both_ways(read, once)):
                for b, value in enumerate(line):
                    there = builder.add(i, builder.mul(place_, e.number(4 * a + b)))
                    e.store(value, e.ahead(target, there), mask)

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
            read = [
                [
                    e.load(
                        e.ahead(source, builder.add(i, builder.mul(place_, e.number(4 * a + b)))),
                        mask,
                    )
                    for a in range(4)
                ]
                for b in range(4)
            ]
            for a, line in enumerate(_both_ways(read, once)):
                for value, column in zip(line, (e.number(0), phase_), strict=True):
                    there = builder.add(builder.mul(row_, e.number(a)), builder.add(i, column))
                    e.store(value, e.ahead(target, there), mask)

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
            read = [
                [
                    e.load(
                        e.ahead(
                            e.ahead(source, builder.add(column, builder.mul(row_, e.number(a)))), i
                        ),
                        mask,
                    )
                    for a in range(2)
                ]
                for column in (e.number(0), phase_)
            ]
            for a, line in enumerate(_both_ways(read, once)):
                for b, value in enumerate(line):
                    there = builder.add(i, builder.mul(place_, e.number(4 * a + b)))
                    e.store(value, e.ahead(target, there), mask)

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
            for a, line in enumerate(_both_ways(read, once)):
                for b, value in enumerate(line):
                    there = builder.add(i, builder.mul(place_, e.number(4 * a + b)))
                    e.store(value, e.ahead(target, there), mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(*arguments), emit


# --- even and odd columns -------------------------------------------------------------------------

GROUPS = (1, 2, 4, 8)
"""The numbers of samples for which ``split_by`` and ``merge_by`` exist, if below a vector."""


def _parts(lanes: int, group: int) -> tuple[list[int], list[int]]:
    """Return the places of the even and of the odd groups in two vectors."""
    even = [j // group * 2 * group + j % group for j in range(lanes)]
    return even, [place + group for place in even]


def _split(group: int) -> Any:
    def split(typing: Any, x: Any, at_x: Any, y: Any, at_y: Any, phase: Any, length: Any) -> Any:
        arguments = (x, at_x, y, at_y, phase, length)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            x_, at_x_, y_, at_y_, phase_, length_ = values
            e = Emit(context, builder, x)
            source, target = e.pointer(x, x_, at_x_), e.pointer(y, y_, at_y_)

            def body(i: Any, mask: Any) -> None:
                here = e.ahead(source, builder.mul(i, e.number(2)))
                first, second = e.load(here), e.load(e.ahead(here, e.lanes))
                for places, column in zip(
                    _parts(e.lanes, group), (e.number(0), phase_), strict=True
                ):
                    picked = e.shuffle(first, second, places)
                    e.store(picked, e.ahead(target, builder.add(i, column)))

            e.over_whole(length_, body)
            return context.get_dummy_value()

        return types.void(*arguments), emit

    return intrinsic(split)


def _merge(group: int) -> Any:
    def merge(typing: Any, x: Any, at_x: Any, phase: Any, y: Any, at_y: Any, length: Any) -> Any:
        arguments = (x, at_x, phase, y, at_y, length)

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            x_, at_x_, phase_, y_, at_y_, length_ = values
            e = Emit(context, builder, x)
            source, target = e.pointer(x, x_, at_x_), e.pointer(y, y_, at_y_)

            def body(i: Any, mask: Any) -> None:
                first = e.load(e.ahead(source, i))
                second = e.load(e.ahead(source, builder.add(i, phase_)))
                even, odd = _parts(e.lanes, group)
                order = {place: j for j, place in enumerate(even)}
                order |= {place: e.lanes + j for j, place in enumerate(odd)}
                there = e.ahead(target, builder.mul(i, e.number(2)))
                for half in range(2):
                    places = [order[half * e.lanes + j] for j in range(e.lanes)]
                    e.store(e.shuffle(first, second, places), e.ahead(there, half * e.lanes))

            e.over_whole(length_, body)
            return context.get_dummy_value()

        return types.void(*arguments), emit

    return intrinsic(merge)


split_by_1, split_by_2, split_by_4, split_by_8 = map(_split, GROUPS)
"""Separate a run into its even and odd groups: y gets the even ones, y + phase the odd ones.

``length`` counts the elements of one parity. Both sides are read and written in whole vectors, so
they need a vector of spare elements."""
merge_by_1, merge_by_2, merge_by_4, merge_by_8 = map(_merge, GROUPS)
"""Join even and odd groups: the inverse of ``split_by``."""
SPARE = 2 * WIDTH
"""Bytes that ``split_by`` and ``merge_by`` may read or write beyond the end."""
