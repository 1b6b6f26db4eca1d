"""Loops over contiguous runs as vector instructions: copy, clear, pool, and the epilogue of a
convolution.

A run is a row of outputs, or the samples of one pixel, which is too short for the loops of a
compiler. Called from functions that numba compiles. Offsets in arrays are counted in elements.
"""

from collections.abc import Callable
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
def copy_run(typing: Any, to: Any, at_to: Any, come: Any, at_come: Any, length: Any) -> Any:
    """Copy a run of this length."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to_, at_to_, come_, at_come_, length_ = values
        e = Emit(context, builder, to)
        target, source = e.pointer(to, to_, at_to_), e.pointer(come, come_, at_come_)
        e.over(
            length_,
            lambda i, mask: e.store(e.load(e.ahead(source, i), mask), e.ahead(target, i), mask),
        )
        return context.get_dummy_value()

    return types.void(to, at_to, come, at_come, length), emit


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


def _maximum(
    e: Emit, w: Emit, source: Any, steps: tuple[Any, Any], sizes: tuple[Any, Any], first: Any,
    row: Any,
) -> Callable[[Any, Any], tuple[Any, Any]]:  # fmt: skip
    """Return a function (i, mask) -> the maximum of a window for a vector of its runs, and the
    number of that maximum, the first of equals. NaN wins.

    Args:
        source: the first run; steps, sizes: distance and number of the window's rows and columns.
        first, row: the number of the first one, and of how many a row is.
    """
    builder = e.builder
    best, won = cgutils.alloca_once(builder, e.vector), cgutils.alloca_once(builder, w.vector)

    def maximum(i: Any, mask: Any) -> tuple[Any, Any]:
        builder.store(e.load(e.ahead(source, i), mask), best)
        builder.store(w.spread(builder.trunc(first, w.element)), won)
        with (
            cgutils.for_range(builder, sizes[0]) as line,
            cgutils.for_range(builder, sizes[1]) as across,
        ):
            at = builder.add(builder.mul(line.index, steps[0]), builder.mul(across.index, steps[1]))
            new, old = e.load(e.ahead(source, builder.add(at, i)), mask), builder.load(best)
            wins = builder.or_(
                builder.fcmp_ordered(">", new, old), builder.fcmp_unordered("uno", new, new)
            )
            number = builder.add(builder.mul(line.index, row), across.index)
            number = w.spread(builder.trunc(builder.add(first, number), w.element))
            builder.store(builder.select(wins, new, old), best)
            builder.store(builder.select(wins, number, builder.load(won)), won)
        return builder.load(best), builder.load(won)

    return maximum


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
        maximum = _maximum(e, w, source, (line_, column_), (height_, width_), e.number(0), width_)

        def body(i: Any, mask: Any) -> None:
            value, won = maximum(i, mask)
            e.store(e.not_below(value, zero), e.ahead(target, i), mask)
            with builder.if_then(keep_):
                above = builder.fcmp_unordered(">", value, zero)  # true for NaN
                none = ir.Constant(w.vector, [-1] * w.lanes)
                w.store(builder.select(above, won, none), w.ahead(taps, i), mask)

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
        sizes = height_, width_
        maximum = _maximum(e, w, source, (line_, column_), sizes, number_, step_)

        def body(i: Any, mask: Any) -> None:
            value, won = maximum(i, mask)
            e.store(value, e.ahead(target, i), mask)
            with builder.if_then(keep_):
                w.store(won, w.ahead(taps, i), mask)

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
