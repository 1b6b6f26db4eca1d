"""The two innermost loops of a convolution as vector instructions, which compilers do not produce
from plain loops.

Both hold a block of sums in registers while they run along contiguous rows of memory, the layout of
batch-last activations. A block of ``ROWS`` by ``VECTORS`` vectors needs so few loads per
multiplication that arithmetic, not memory, is the limit.

Both are called from functions that numba compiles. Offsets in arrays are counted in elements.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from portacnn.backends.numba.emit import FEATURES, INT, WIDTH, Emit

# 32 vector registers: AVX-512, or not x86
_MANY_REGISTERS = FEATURES.get("avx512f", False) or not FEATURES.get("sse2", False)

ROWS = 8 if _MANY_REGISTERS else 4
"""Output channels per ``outer_tile``."""
VECTORS = 3
"""Vectors of an output row per ``outer_tile``."""
SPAN = VECTORS * WIDTH
"""The size of these vectors in bytes."""
GRADS, TAPS = (4, 6) if _MANY_REGISTERS else (2, 4)
"""Gradients and taps per ``inner_tile``."""


def _outer_tile(vectors: int, masked: bool) -> Any:
    def tile(
        typing: Any, x: Any, at_x: Any, taps: Any, at_taps: Any, count: Any, weight: Any,
        at_weight: Any, step_weight: Any,
        bias: Any, at_bias: Any, y: Any, at_y: Any, step_y: Any, rows: Any, lanes: Any,
    ) -> Any:  # fmt: skip
        arguments = (
            x, at_x, taps, at_taps, count, weight, at_weight, step_weight, bias, at_bias, y, at_y,
            step_y, rows, lanes,
        )  # fmt: skip

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            (
                x_, at_x_, taps_, at_taps_, count_, weight_, at_weight_, step_weight_, bias_,
                at_bias_, y_, at_y_,
                step_y_, rows_, lanes_,
            ) = values  # fmt: skip
            e = Emit(context, builder, x)
            mask = e.mask(lanes_) if masked else None
            sums = e.sums(ROWS, vectors)
            biases, weights = (
                e.pointer(bias, bias_, at_bias_),
                e.pointer(weight, weight_, at_weight_),
            )
            factors = []
            for row in range(ROWS):
                there = e.at_most(row, rows_)  # beyond the last row, repeat it
                factors.append(e.ahead(weights, builder.mul(there, step_weight_)))
                start = e.spread(builder.load(e.ahead(biases, there)))
                for column in range(vectors):
                    builder.store(start, sums[row][column])
            inputs, places = e.pointer(x, x_, at_x_), e.pointer(taps, taps_, at_taps_)
            with cgutils.for_range(builder, count_) as loop:
                place = builder.mul(loop.index, e.number(2))
                here = e.ahead(inputs, builder.sext(builder.load(e.ahead(places, place)), INT))
                of_tap = builder.sext(
                    builder.load(e.ahead(places, builder.add(place, e.number(1)))), INT
                )
                seen = [e.load(e.ahead(here, column * e.lanes), mask) for column in range(vectors)]
                for row in range(ROWS):
                    factor = e.spread(builder.load(e.ahead(factors[row], of_tap)))
                    for column in range(vectors):
                        into = sums[row][column]
                        builder.store(
                            e.multiply_add(seen[column], factor, builder.load(into)), into
                        )
            for row in range(ROWS):
                with builder.if_then(builder.icmp_signed("<", e.number(row), rows_)):
                    out = e.pointer(y, y_, builder.add(at_y_, builder.mul(step_y_, e.number(row))))
                    for column in range(vectors):
                        e.store(
                            builder.load(sums[row][column]), e.ahead(out, column * e.lanes), mask
                        )
            return context.get_dummy_value()

        return types.void(*arguments), emit

    return intrinsic(tile)


outer_tile: Callable[..., None] = _outer_tile(VECTORS, masked=False)
"""y[r, :] = bias[r] + sum over k of weight[r, k] * x[k, :] for ROWS rows of y and a run of VECTORS
vectors.

Arguments (every ``at_`` is an offset into the array before it, every ``step_`` the distance of its
rows):
    x, at_x
    taps (int32), at_taps, count: for each k, the offset of its run from at_x and of its weight from
        at_weight
    weight, at_weight, step_weight
    bias, at_bias
    y, at_y, step_y
    rows: the number of valid rows
    lanes: for ``outer_edge``
"""

outer_edge: Callable[..., None] = _outer_tile(1, masked=True)
"""``outer_tile`` for the end of a run: one vector with ``lanes`` valid elements."""


@intrinsic
def inner_tile(
    typing: Any, dy: Any, at_dy: Any, step_dy: Any, rows: Any, x: Any, at_x: Any, taps: Any,
    at_taps: Any, length: Any,
    lines: Any, line_dy: Any, line_x: Any, sums: Any, at_sums: Any,
) -> Any:  # fmt: skip
    """Add to sums[g, k] the sum over i < length of dy[g, i] * x[k, i], for GRADS rows of dy and the
    runs of TAPS taps.

    Arguments as for ``outer_tile``; rows is the number of valid rows (the other sums are
    undefined). The sums run over several ``lines``, at distance line_dy in dy and line_x in x.
    """
    arguments = (
        dy,
        at_dy,
        step_dy,
        rows,
        x,
        at_x,
        taps,
        at_taps,
        length,
        lines,
        line_dy,
        line_x,
        sums,
        at_sums,
    )

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        (
            dy_, at_dy_, step_dy_, rows_, x_, at_x_, taps_, at_taps_, length_, lines_, line_dy_,
            line_x_, sums_, at_sums_,
        ) = values  # fmt: skip
        e = Emit(context, builder, x)
        block = e.sums(GRADS, TAPS)
        for row in block:
            for into in row:
                builder.store(ir.Constant(e.vector, [0.0] * e.lanes), into)
        places = e.pointer(taps, taps_, at_taps_)
        offsets = [builder.sext(builder.load(e.ahead(places, 2 * k)), INT) for k in range(TAPS)]
        inputs = [e.pointer(x, x_, builder.add(at_x_, offset)) for offset in offsets]
        grads = [
            e.pointer(dy, dy_, builder.add(at_dy_, builder.mul(step_dy_, e.at_most(g, rows_))))
            for g in range(GRADS)
        ]
        with cgutils.for_range(builder, lines_) as line:
            in_dy, in_x = builder.mul(line.index, line_dy_), builder.mul(line.index, line_x_)

            def step(i: Any, mask: Any) -> None:
                given = [e.load(e.ahead(pointer, builder.add(in_dy, i)), mask) for pointer in grads]
                for k in range(TAPS):
                    seen = e.load(e.ahead(inputs[k], builder.add(in_x, i)), mask)
                    for g in range(GRADS):
                        into = block[g][k]
                        builder.store(e.multiply_add(given[g], seen, builder.load(into)), into)

            e.over(length_, step)
        out = e.pointer(sums, sums_, at_sums_)
        for g in range(GRADS):
            for k in range(TAPS):
                into = e.ahead(out, g * TAPS + k)
                builder.store(
                    builder.fadd(builder.load(into), e.total(builder.load(block[g][k]))), into
                )
        return context.get_dummy_value()

    return types.void(*arguments), emit
