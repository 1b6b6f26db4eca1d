"""Loops over contiguous runs as vector instructions: copy, clear, pool, and the epilogue of a
convolution.

A run is a row of outputs, or the samples of one pixel, which is too short for the loops of a
compiler. Called from functions that numba compiles. Offsets in arrays are counted in elements.
"""

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from portacnn.backends.numba.emit import Emit


@intrinsic
def clear(typing: Any, to: Any, at_to: Any, length: Any) -> Any:
    """Set a run of this length to 0."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to_, at_to_, length_ = values
        e = Emit(context, builder, to)
        target, zero = e.pointer(to, to_, at_to_), ir.Constant(e.vector, [0.0] * e.lanes)
        e.over(length_, lambda i, mask: e.store(zero, e.ahead(target, i), mask))
        return context.get_dummy_value()

    return types.void(to, at_to, length), emit


@intrinsic
def move_above(
    typing: Any, to: Any, at_to: Any, come: Any, at_come: Any, floor: Any, length: Any
) -> Any:
    """Copy a run of this length: to = max(floor, come); NaN stays."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to_, at_to_, come_, at_come_, floor_, length_ = values
        e = Emit(context, builder, to)
        target, source, least = (
            e.pointer(to, to_, at_to_),
            e.pointer(come, come_, at_come_),
            e.spread(floor_),
        )

        def body(i: Any, mask: Any) -> None:
            e.store(e.not_below(e.load(e.ahead(source, i), mask), least), e.ahead(target, i), mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(to, at_to, come, at_come, floor, length), emit


@intrinsic
def move_where(
    typing: Any, to: Any, at_to: Any, come: Any, key: Any, at: Any, number: Any, length: Any
) -> Any:
    """Copy a run of this length where key matches, else write 0.

    A floating-point key matches if it is above ``number``; an int8 key if it equals ``number``.
    """

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to_, at_to_, come_, key_, at_, number_, length_ = values
        e = Emit(context, builder, to)
        k = e.beside(key)
        target, source, keys = (
            e.pointer(to, to_, at_to_),
            e.pointer(come, come_, at_),
            k.pointer(key, key_, at_),
        )
        zero, wanted = ir.Constant(e.vector, [0.0] * e.lanes), k.spread(number_)

        def body(i: Any, mask: Any) -> None:
            found = k.load(k.ahead(keys, i), mask)
            if isinstance(key.dtype, types.Float):
                here = builder.fcmp_unordered(">", found, wanted)  # true for NaN
            else:
                here = builder.icmp_signed("==", found, wanted)
            e.store(
                builder.select(here, e.load(e.ahead(source, i), mask), zero),
                e.ahead(target, i),
                mask,
            )

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(to, at_to, come, key, at, number, length), emit


@intrinsic
def pool_run(
    typing: Any, x: Any, at_x: Any, line: Any, column: Any, height: Any, width: Any, y: Any,
    winner: Any, at_y: Any,
    keep: Any, length: Any,
) -> Any:  # fmt: skip
    """Write y = relu of the maximum over ``height`` by ``width`` runs of x, at distances ``line``
    and ``column``; NaN wins.

    With ``keep``, winner receives the number of the maximum, the first of equals; -1 where y is not
    above 0.
    """
    arguments = (x, at_x, line, column, height, width, y, winner, at_y, keep, length)

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x_, at_x_, line_, column_, height_, width_, y_, winner_, at_y_, keep_, length_ = values
        e = Emit(context, builder, x)
        w = e.beside(winner)
        source, target, taps = (
            e.pointer(x, x_, at_x_),
            e.pointer(y, y_, at_y_),
            w.pointer(winner, winner_, at_y_),
        )
        zero = ir.Constant(e.vector, [0.0] * e.lanes)
        best, won = cgutils.alloca_once(builder, e.vector), cgutils.alloca_once(builder, w.vector)

        def body(i: Any, mask: Any) -> None:
            builder.store(e.load(e.ahead(source, i), mask), best)
            builder.store(ir.Constant(w.vector, [0] * w.lanes), won)
            with (
                cgutils.for_range(builder, height_) as row,
                cgutils.for_range(builder, width_) as across,
            ):
                at = builder.add(builder.mul(row.index, line_), builder.mul(across.index, column_))
                new, old = e.load(e.ahead(source, builder.add(at, i)), mask), builder.load(best)
                wins = builder.or_(
                    builder.fcmp_ordered(">", new, old), builder.fcmp_unordered("uno", new, new)
                )
                number = builder.trunc(
                    builder.add(builder.mul(row.index, width_), across.index), w.element
                )
                builder.store(builder.select(wins, new, old), best)
                builder.store(builder.select(wins, w.spread(number), builder.load(won)), won)
            value = builder.load(best)
            e.store(e.not_below(value, zero), e.ahead(target, i), mask)
            with builder.if_then(keep_):
                above = builder.fcmp_unordered(">", value, zero)  # true for NaN
                none = ir.Constant(w.vector, [-1] * w.lanes)
                w.store(builder.select(above, builder.load(won), none), w.ahead(taps, i), mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(*arguments), emit


@intrinsic
def window_run(
    typing: Any, x: Any, at_x: Any, line: Any, column: Any, height: Any, width: Any, y: Any,
    winner: Any, at_y: Any, number: Any, step: Any, keep: Any, length: Any,
) -> Any:  # fmt: skip
    """Write y = the maximum over ``height`` by ``width`` runs of x, at distances ``line`` and
    ``column``; NaN wins.

    With ``keep``, winner receives the number of the maximum, the first of equals: those of a row
    count from ``number`` on, those of the next row from ``number + step``.
    """
    arguments = (
        x, at_x, line, column, height, width, y, winner, at_y, number, step, keep, length
    )  # fmt: skip

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (
            x_, at_x_, line_, column_, height_, width_, y_, winner_, at_y_, number_, step_, keep_,
            length_,
        ) = values  # fmt: skip
        e = Emit(context, builder, x)
        w = e.beside(winner)
        source, target, taps = (
            e.pointer(x, x_, at_x_),
            e.pointer(y, y_, at_y_),
            w.pointer(winner, winner_, at_y_),
        )
        best, won = cgutils.alloca_once(builder, e.vector), cgutils.alloca_once(builder, w.vector)

        def body(i: Any, mask: Any) -> None:
            builder.store(e.load(e.ahead(source, i), mask), best)
            builder.store(w.spread(builder.trunc(number_, w.element)), won)
            with (
                cgutils.for_range(builder, height_) as row,
                cgutils.for_range(builder, width_) as across,
            ):
                at = builder.add(builder.mul(row.index, line_), builder.mul(across.index, column_))
                new, old = e.load(e.ahead(source, builder.add(at, i)), mask), builder.load(best)
                wins = builder.or_(
                    builder.fcmp_ordered(">", new, old), builder.fcmp_unordered("uno", new, new)
                )
                here = builder.add(
                    number_, builder.add(builder.mul(row.index, step_), across.index)
                )
                builder.store(builder.select(wins, new, old), best)
                with builder.if_then(keep_):
                    tap = w.spread(builder.trunc(here, w.element))
                    builder.store(builder.select(wins, tap, builder.load(won)), won)
            e.store(builder.load(best), e.ahead(target, i), mask)
            with builder.if_then(keep_):
                w.store(builder.load(won), w.ahead(taps, i), mask)

        e.over(length_, body)
        return context.get_dummy_value()

    return types.void(*arguments), emit


@intrinsic
def finish_run(
    typing: Any, to: Any, at_to: Any, come: Any, at_come: Any, scale: Any, shift: Any,
    residual: Any, at_residual: Any, adds: Any, low: Any, high: Any, length: Any,
) -> Any:  # fmt: skip
    """Write to = min(max(come * scale + shift + residual, low), high), the epilogue of a
    convolution; NaN stays. ``residual`` is read only if ``adds``; ``to`` may be ``come``.
    """
    arguments = (
        to, at_to, come, at_come, scale, shift, residual, at_residual, adds, low, high, length
    )  # fmt: skip

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (
            to_, at_to_, come_, at_come_, scale_, shift_, residual_, at_residual_, adds_, low_,
            high_, length_,
        ) = values  # fmt: skip
        e = Emit(context, builder, to)
        target, source, more = (
            e.pointer(to, to_, at_to_),
            e.pointer(come, come_, at_come_),
            e.pointer(residual, residual_, at_residual_),
        )
        factor, start = e.spread(scale_), e.spread(shift_)
        least, most = e.spread(low_), e.spread(high_)

        def write(i: Any, mask: Any, value: Any) -> None:
            value = e.not_above(e.not_below(value, least), most)
            e.store(value, e.ahead(target, i), mask)

        def scaled(i: Any, mask: Any) -> Any:
            return e.multiply_add(e.load(e.ahead(source, i), mask), factor, start)

        with builder.if_else(adds_) as (then, otherwise):
            with then:
                e.over(
                    length_,
                    lambda i, mask: write(
                        i, mask, builder.fadd(scaled(i, mask), e.load(e.ahead(more, i), mask))
                    ),
                )
            with otherwise:
                e.over(length_, lambda i, mask: write(i, mask, scaled(i, mask)))
        return context.get_dummy_value()

    return types.void(*arguments), emit
