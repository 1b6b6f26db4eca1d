"""The innermost loops of a convolution that sums over few channels, such as depthwise, as vector
instructions: whole rows of one output channel from the rows of one input channel.

As in ``tiles``, sums stay in registers while the taps are added, and offsets are counted in
elements. With one input channel per output, each loaded vector serves few products; the loads are
the limit. ``rows_of_3`` and the like therefore compute ``LINES`` output rows together, so that a
row that several of them read is loaded once, and keep the weights in registers.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from portacnn.backends.numba.emit import INT, Emit

LINES = 4
"""Output rows per call of a function of ``row_tiles``."""
_VECTORS = 4  # vectors of a row per step of ``row_of_taps``
DOTS = 9
"""Taps per call of ``dot_rows``."""
NOTHING, RESIDUAL, OWN = 0, 1, 2
"""What is added to a sum before its limits: ``residual`` at the same place, or the result itself as
it was.
"""


def _results(
    e: Emit, y: Any, y_: Any, residual: Any, residual_: Any, adds: Any, at: Any
) -> tuple[Any, Any]:
    """Return the pointers to the results and to what is added to them."""
    target, before = e.pointer(y, y_, at), e.pointer(residual, residual_, at)
    own = e.builder.icmp_signed("==", adds, e.number(OWN))
    return target, e.builder.select(own, target, before)


def _finish(
    e: Emit, value: Any, at: Any, before: Any, adds: Any, low: Any, high: Any, mask: Any
) -> None:
    """Store min(max(value [+ before], low), high) at the pointer ``at``; NaN stays."""
    builder = e.builder
    total = cgutils.alloca_once(builder, e.vector)
    builder.store(value, total)
    with builder.if_then(builder.icmp_signed("!=", adds, e.number(0))):
        builder.store(builder.fadd(value, e.load(before, mask)), total)
    e.store(e.not_above(e.not_below(builder.load(total), low), high), at, mask)


def _rows(height: int, width: int, stride: int) -> Any:
    def tile(
        typing: Any, x: Any, at_x: Any, line_x: Any, taps: Any, weight: Any, at_weight: Any,
        shift: Any, y: Any, at_y: Any, line_y: Any, residual: Any, adds: Any, low: Any, high: Any,
        lines: Any, length: Any,
    ) -> Any:  # fmt: skip
        arguments = (
            x, at_x, line_x, taps, weight, at_weight, shift, y, at_y, line_y, residual, adds, low,
            high, lines, length,
        )  # fmt: skip

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            (
                x_, at_x_, line_x_, taps_, weight_, at_weight_, shift_, y_, at_y_, line_y_,
                residual_, adds_, low_, high_, lines_, length_,
            ) = values  # fmt: skip
            e = Emit(context, builder, x)
            offsets, factors = (
                e.pointer(taps, taps_, e.number(0)),
                e.pointer(weight, weight_, at_weight_),
            )
            across = [
                builder.sext(builder.load(e.ahead(offsets, 2 * j)), INT) for j in range(width)
            ]
            inputs = e.pointer(x, x_, at_x_)
            sources = [
                e.ahead(inputs, builder.mul(line_x_, e.number(row)))
                for row in range((LINES - 1) * stride + height)
            ]
            splats = [
                [e.spread(builder.load(e.ahead(factors, i * width + j))) for j in range(width)]
                for i in range(height)
            ]
            start, least, most = e.spread(shift_), e.spread(low_), e.spread(high_)
            steps = [builder.mul(line_y_, e.number(r)) for r in range(LINES)]
            target, before = _results(e, y, y_, residual, residual_, adds_, at_y_)

            def body(at: Any, mask: Any) -> None:
                sums = [start] * LINES
                for row, source in enumerate(sources):
                    uses = [
                        (r, row - r * stride)
                        for r in range(LINES)
                        if 0 <= row - r * stride < height
                    ]
                    for j in range(width):
                        seen = e.load(e.ahead(source, builder.add(at, across[j])), mask)
                        for r, i in uses:
                            sums[r] = e.multiply_add(seen, splats[i][j], sums[r])
                for r in range(LINES):
                    with builder.if_then(builder.icmp_signed("<", e.number(r), lines_)):
                        place = builder.add(at, steps[r])
                        _finish(
                            e, sums[r], e.ahead(target, place), e.ahead(before, place), adds_,
                            least, most, mask,
                        )  # fmt: skip

            e.over(length_, body)
            return context.get_dummy_value()

        return types.void(*arguments), emit

    return intrinsic(tile)


rows_of_3: Callable[..., None] = _rows(3, 3, 1)
"""Compute up to LINES output rows: y[r, :] = clip(shift + sum over the taps of a 3x3 kernel [+
residual]).

Arguments (``at_`` is an offset, ``line_`` the distance of two rows):
    x, at_x, line_x: the input rows; row r of the output starts at row r * stride
    taps (int32), of which the first offsets are those of the columns of the kernel
    weight, at_weight
    shift: the first summand
    y, at_y, line_y
    residual, adds: NOTHING, RESIDUAL or OWN
    low, high: the limits
    lines: the number of valid rows; x has rows for LINES
    length: of a row
"""
rows_of_3_by_2: Callable[..., None] = _rows(3, 3, 2)
"""``rows_of_3`` with a stride of 2 from row to row."""
rows_of_5: Callable[..., None] = _rows(5, 5, 1)
"""``rows_of_3`` for a 5x5 kernel."""
rows_of_5_by_2: Callable[..., None] = _rows(5, 5, 2)
"""``rows_of_5`` with a stride of 2 from row to row."""


@intrinsic
def row_of_taps(
    typing: Any, x: Any, at_x: Any, taps: Any, at_taps: Any, count: Any, weight: Any,
    at_weight: Any, shift: Any, y: Any, at_y: Any, residual: Any, adds: Any, low: Any, high: Any,
    length: Any,
) -> Any:  # fmt: skip
    """Compute one output row as ``rows_of_3`` does, for any taps: ``count`` of them from at_taps
    on, each with the offset of its run in x and of its weight.
    """
    arguments = (
        x, at_x, taps, at_taps, count, weight, at_weight, shift, y, at_y, residual, adds, low, high,
        length,
    )  # fmt: skip

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (
            x_, at_x_, taps_, at_taps_, count_, weight_, at_weight_, shift_, y_, at_y_, residual_,
            adds_, low_, high_, length_,
        ) = values  # fmt: skip
        e = Emit(context, builder, x)
        places, factors = (
            e.pointer(taps, taps_, builder.mul(at_taps_, e.number(2))),
            e.pointer(weight, weight_, at_weight_),
        )
        inputs = e.pointer(x, x_, at_x_)
        start, least, most = e.spread(shift_), e.spread(low_), e.spread(high_)
        target, before = _results(e, y, y_, residual, residual_, adds_, at_y_)

        def step(at: Any, mask: Any, vectors: int) -> None:
            (sums,) = e.sums(1, vectors)
            for into in sums:
                builder.store(start, into)
            with cgutils.for_range(builder, count_) as loop:
                place = builder.mul(loop.index, e.number(2))
                offset = builder.sext(builder.load(e.ahead(places, place)), INT)
                of_tap = builder.load(e.ahead(places, builder.add(place, e.number(1))))
                factor = e.spread(builder.load(e.ahead(factors, builder.sext(of_tap, INT))))
                here = e.ahead(inputs, builder.add(at, offset))
                for v, into in enumerate(sums):
                    seen = e.load(e.ahead(here, v * e.lanes), mask)
                    builder.store(e.multiply_add(seen, factor, builder.load(into)), into)
            for v, into in enumerate(sums):
                place = builder.add(at, e.number(v * e.lanes))
                _finish(
                    e, builder.load(into), e.ahead(target, place), e.ahead(before, place), adds_,
                    least, most, mask,
                )  # fmt: skip

        wide = e.number(_VECTORS * e.lanes)
        blocks = builder.sdiv(length_, wide)
        with cgutils.for_range(builder, blocks) as loop:
            step(builder.mul(loop.index, wide), None, _VECTORS)
        done = builder.mul(blocks, wide)
        e.over(builder.sub(length_, done), lambda i, mask: step(builder.add(done, i), mask, 1))
        return context.get_dummy_value()

    return types.void(*arguments), emit


@intrinsic
def dot_rows(
    typing: Any, dy: Any, at_dy: Any, line_dy: Any, x: Any, at_x: Any, line_x: Any, taps: Any,
    at_taps: Any, lines: Any, length: Any, sums: Any, at_sums: Any,
) -> Any:  # fmt: skip
    """Add to sums[k] (float64), k < DOTS, the sum over lines and i < length of dy[i] * x[i + the
    offset of tap k].

    Arguments as for ``row_of_taps``.
    """
    arguments = (
        dy, at_dy, line_dy, x, at_x, line_x, taps, at_taps, lines, length, sums, at_sums,
    )  # fmt: skip

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (
            dy_, at_dy_, line_dy_, x_, at_x_, line_x_, taps_, at_taps_, lines_, length_, sums_,
            at_sums_,
        ) = values  # fmt: skip
        e = Emit(context, builder, x)
        (block,) = e.sums(1, DOTS)
        for into in block:
            builder.store(ir.Constant(e.vector, [0.0] * e.lanes), into)
        places = e.pointer(taps, taps_, builder.mul(at_taps_, e.number(2)))
        inputs = e.pointer(x, x_, at_x_)
        sources = [
            e.ahead(inputs, builder.sext(builder.load(e.ahead(places, 2 * k)), INT))
            for k in range(DOTS)
        ]
        grads = e.pointer(dy, dy_, at_dy_)
        with cgutils.for_range(builder, lines_) as line:
            in_dy, in_x = builder.mul(line.index, line_dy_), builder.mul(line.index, line_x_)

            def step(i: Any, mask: Any) -> None:
                given = e.load(e.ahead(grads, builder.add(in_dy, i)), mask)
                for k, into in enumerate(block):
                    seen = e.load(e.ahead(sources[k], builder.add(in_x, i)), mask)
                    builder.store(e.multiply_add(given, seen, builder.load(into)), into)

            e.over(length_, step)
        out = e.pointer(sums, sums_, at_sums_)
        double = context.get_value_type(types.float64)
        for k, into in enumerate(block):
            total = e.total(builder.load(into))
            total = total if e.size == 8 else builder.fpext(total, double)
            place = e.ahead(out, k)
            builder.store(builder.fadd(builder.load(place), total), place)
        return context.get_dummy_value()

    return types.void(*arguments), emit
