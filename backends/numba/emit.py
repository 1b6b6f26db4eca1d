"""Vector instructions for compiled loops: an LLVM builder with the vector type of an array.

numba's compiler does not produce these instructions from plain loops. They are written in LLVM's
vector types, which LLVM translates to the CPU's instructions. Offsets in arrays are counted in
elements.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types

FEATURES = llvmlite.binding.get_host_cpu_features()
WIDTH = 64 if FEATURES.get("avx512f") else 32 if FEATURES.get("avx") else 16
"""The size of a vector in bytes."""

INT = ir.IntType(64)


class Emit:
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

    def beside(self, array: types.Array) -> "Emit":
        """Return a builder for another array that is processed in parallel with this one."""
        return Emit(self.context, self.builder, array, self.lanes)

    def number(self, value: int) -> Any:
        return ir.Constant(INT, value)

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
        lane = ir.Constant(ir.VectorType(INT, self.lanes), list(range(self.lanes)))
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

    def not_above(self, value: Any, most: Any) -> Any:
        """Return the smaller one; NaN stays."""
        return self.builder.select(self.builder.fcmp_ordered(">", value, most), most, value)

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

    def over_whole(self, length: Any, body: Callable[[Any, Any], None]) -> None:
        """Call ``body(i, None)`` for a run of this length in whole vectors; the last one may end
        behind the run.
        """
        count = self.builder.sdiv(
            self.builder.add(length, self.number(self.lanes - 1)), self.number(self.lanes)
        )
        with cgutils.for_range(self.builder, count) as loop:
            body(self.builder.mul(loop.index, self.number(self.lanes)), None)

    def shuffle(self, first: Any, second: Any, places: list[int]) -> Any:
        """Return a vector of the elements at these places of two vectors."""
        kind = ir.VectorType(ir.IntType(32), len(places))
        return self.builder.shuffle_vector(first, second, ir.Constant(kind, places))

    def gather(self, pointer: Any, step: int, mask: Any = None) -> Any:
        """Load the elements at ``pointer``, ``pointer + step``, ... as a vector."""
        value = ir.Constant(self.vector, [0.0] * self.lanes)
        for lane in range(self.lanes):
            here = lane * step
            if mask is not None:  # beyond the last one, load the first again
                valid = self.builder.extract_element(mask, ir.Constant(ir.IntType(32), lane))
                here = self.builder.select(valid, self.number(here), self.number(0))
            one = self.builder.load(self.ahead(pointer, here))
            value = self.builder.insert_element(value, one, ir.Constant(ir.IntType(32), lane))
        return value

    def sums(self, rows: int, columns: int) -> list[list[Any]]:
        """Return a block of vectors that stay in registers."""
        return [
            [cgutils.alloca_once(self.builder, self.vector) for _ in range(columns)]
            for _ in range(rows)
        ]
