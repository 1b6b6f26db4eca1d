"""The two innermost loops of a convolution as vector instructions, which compilers do not produce
from plain loops.

Both hold a block of sums in registers while they run along contiguous rows of memory, the layout of
batch-last activations. A block of ``ROWS`` by ``VECTORS`` vectors needs so few loads per
multiplication that arithmetic, not memory, is the limit. They are written in LLVM's vector types,
which LLVM translates to the CPU's instructions.

Both are called from functions that numba compiles. Offsets in arrays are counted in elements.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_FEATURES = llvmlite.binding.get_host_cpu_features()
# 32 vector registers: AVX-512, or not x86
_MANY_REGISTERS = _FEATURES.get("avx512f", False) or not _FEATURES.get("sse2", False)

WIDTH = 64 if _FEATURES.get("avx512f") else 32 if _FEATURES.get("avx") else 16
"""The size of a vector in bytes."""
ROWS = 8 if _MANY_REGISTERS else 4
"""Output channels per ``outer_tile``."""
VECTORS = 3
"""Vectors of an output row per ``outer_tile``."""
SPAN = VECTORS * WIDTH
"""The size of these vectors in bytes."""
GRADS, TAPS = (4, 6) if _MANY_REGISTERS else (2, 4)
"""Gradients and taps per ``inner_tile``."""

_INT = ir.IntType(64)


class _Emit:
    """An LLVM builder with the element type and the vector type of an array."""

    def __init__(
        self, context: Any, builder: Any, array: types.Array, lanes: int | None = None
    ) -> None:
        self.context, self.builder = context, builder
        self.element = context.get_value_type(array.dtype)
        self.size = array.dtype.bitwidth // 8
        self.lanes = lanes or WIDTH // self.size
        self.vector = ir.VectorType(self.element, self.lanes)
        self.kind = "f" if isinstance(array.dtype, types.Float) else "i"

    def beside(self, array: types.Array) -> "_Emit":
        """Return a builder for another array that is processed in parallel with this one."""
        return _Emit(self.context, self.builder, array, self.lanes)

    def number(self, value: int) -> Any:
        return ir.Constant(_INT, value)

    def pointer(self, array: types.Array, value: Any, offset: Any) -> Any:
        """Return a pointer to the array's element at this offset."""
        return self.builder.gep(
            self.context.make_array(array)(self.context, self.builder, value).data, [offset]
        )

    def ahead(self, pointer: Any, elements: Any) -> Any:
        return self.builder.gep(
            pointer, [elements if isinstance(elements, ir.Value) else self.number(elements)]
        )

    def at_most(self, row: int, rows: Any) -> Any:
        """Return ``row``, or the last row if there are only ``rows``."""
        return self.builder.select(
            self.builder.icmp_signed("<", self.number(row), rows),
            self.number(row),
            self.builder.sub(rows, self.number(1)),
        )

    def _as_vector(self, pointer: Any) -> Any:
        return self.builder.bitcast(pointer, self.vector.as_pointer())

    def load(self, pointer: Any, mask: Any = None) -> Any:
        """Load a vector from unaligned memory. With a mask, unset lanes are zero and are not
        read.
        """
        if mask is None:
            return self.builder.load(self._as_vector(pointer), align=self.size)
        kind = [self.vector.as_pointer(), ir.IntType(32), mask.type, self.vector]
        function = self._intrinsic("llvm.masked.load", self.vector, kind)
        zero = ir.Constant(self.vector, [0.0 if self.kind == "f" else 0] * self.lanes)
        return self.builder.call(
            function, [self._as_vector(pointer), ir.Constant(ir.IntType(32), self.size), mask, zero]
        )

    def store(self, value: Any, pointer: Any, mask: Any = None) -> None:
        if mask is None:
            self.builder.store(value, self._as_vector(pointer), align=self.size)
            return
        kind = [self.vector, self.vector.as_pointer(), ir.IntType(32), mask.type]
        function = self._intrinsic("llvm.masked.store", ir.VoidType(), kind)
        self.builder.call(
            function,
            [value, self._as_vector(pointer), ir.Constant(ir.IntType(32), self.size), mask],
        )

    def mask(self, count: Any) -> Any:
        """Return a mask of the first ``count`` lanes."""
        lane = ir.Constant(ir.VectorType(_INT, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", lane, self.spread(count))

    def spread(self, scalar: Any) -> Any:
        """Return a vector with this scalar in every lane."""
        kind = ir.VectorType(scalar.type, self.lanes)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, scalar, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(
            first, nothing, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        )

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.builder.call(
            self._intrinsic("llvm.fma", self.vector, [self.vector] * 3), [a, b, c]
        )

    def not_below(self, value: Any, least: Any) -> Any:
        """Return the larger one; NaN stays."""
        return self.builder.select(self.builder.fcmp_ordered("<", value, least), least, value)

    def total(self, value: Any) -> Any:
        """Return the sum over the lanes, by halves."""
        lanes = self.lanes
        while lanes > 1:
            lanes //= 2
            halves = (
                self.builder.shuffle_vector(
                    value, value, ir.Constant(ir.VectorType(ir.IntType(32), lanes), list(places))
                )
                for places in (range(lanes), range(lanes, 2 * lanes))
            )
            value = self.builder.fadd(*halves)
        return self.builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    def _intrinsic(self, name: str, result: Any, arguments: list[Any]) -> Any:
        suffix = f".v{self.lanes}{self.kind}{self.size * 8}" + (".p0" if "masked" in name else "")
        return cgutils.get_or_insert_function(
            self.builder.module, ir.FunctionType(result, arguments), name + suffix
        )

    def over(self, length: Any, body: Callable[[Any, Any], None]) -> None:
        """Call ``body(i, mask)`` for a run of this length, one vector at a time; only the last one
        has a mask.
        """
        whole = self.builder.sdiv(length, self.number(self.lanes))
        with cgutils.for_range(self.builder, whole) as loop:
            body(self.builder.mul(loop.index, self.number(self.lanes)), None)
        done = self.builder.mul(whole, self.number(self.lanes))
        rest = self.builder.sub(length, done)
        with self.builder.if_then(self.builder.icmp_signed(">", rest, self.number(0))):
            body(done, self.mask(rest))

    def sums(self, rows: int, columns: int) -> list[list[Any]]:
        """Return a block of vectors that stay in registers."""
        return [
            [cgutils.alloca_once(self.builder, self.vector) for _ in range(columns)]
            for _ in range(rows)
        ]


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
            e = _Emit(context, builder, x)
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
                here = e.ahead(inputs, builder.sext(builder.load(e.ahead(places, place)), _INT))
                of_tap = builder.sext(
                    builder.load(e.ahead(places, builder.add(place, e.number(1)))), _INT
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
        e = _Emit(context, builder, x)
        block = e.sums(GRADS, TAPS)
        for row in block:
            for into in row:
                builder.store(ir.Constant(e.vector, [0.0] * e.lanes), into)
        places = e.pointer(taps, taps_, at_taps_)
        offsets = [builder.sext(builder.load(e.ahead(places, 2 * k)), _INT) for k in range(TAPS)]
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


# Their length is the number of samples of a panel, too short for the loops of a compiler.


@intrinsic
def clear(typing: Any, to: Any, at_to: Any, length: Any) -> Any:
    """Set a run of this length to 0."""

    def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        to_, at_to_, length_ = values
        e = _Emit(context, builder, to)
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
        e = _Emit(context, builder, to)
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
        e = _Emit(context, builder, to)
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
        e = _Emit(context, builder, x)
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
