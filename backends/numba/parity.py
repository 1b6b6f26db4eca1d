"""The even and the odd columns of a row: separate them and join them again, as vector instructions.

A column is a group of 1, 2, 4 or 8 samples, fewer than a vector holds. Called from functions that
numba compiles. Offsets in arrays are counted in elements.
"""

from typing import Any

from numba.core import cgutils, types
from numba.extending import intrinsic

from portacnn.backends.numba.emit import Emit

GROUPS = (1, 2, 4, 8)
"""The sizes of a group for which there are functions, if a vector holds several."""


def _places(lanes: int, group: int) -> tuple[list[int], list[int]]:
    """Return the places of the even and of the odd groups in two vectors."""
    even = [(2 * group * (lane // group) + lane % group) % (2 * lanes) for lane in range(lanes)]
    return even, [(place + group) % (2 * lanes) for place in even]


def _split(group: int) -> Any:
    def split(
        typing: Any, to: Any, at_even: Any, count_even: Any, at_odd: Any, count_odd: Any,
        come: Any, at_come: Any, length: Any,
    ) -> Any:  # fmt: skip
        arguments = to, at_even, count_even, at_odd, count_odd, come, at_come, length

        def emit(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            to_, at_even_, count_even_, at_odd_, count_odd_, come_, at_come_, length_ = values
            e = Emit(context, builder, to)
            source = e.pointer(come, come_, at_come_)
            targets = [e.pointer(to, to_, at) for at in (at_even_, at_odd_)]
            counts = count_even_, count_odd_
            picks = _places(e.lanes, group)
            lanes = e.number(e.lanes)

            def move(at: Any, masked: bool) -> None:
                start = builder.add(at, at)
                places = start, builder.add(start, lanes)
                pair = [
                    e.load(e.ahead(source, p), e.mask(builder.sub(length_, p)) if masked else None)
                    for p in places
                ]
                for target, count, pick in zip(targets, counts, picks, strict=True):
                    mask = e.mask(builder.sub(count, at)) if masked else None
                    e.store(e.shuffle(*pair, pick), e.ahead(target, at), mask)

            fewer = builder.select(
                builder.icmp_signed("<", count_even_, count_odd_), count_even_, count_odd_
            )
            more = builder.select(
                builder.icmp_signed("<", count_even_, count_odd_), count_odd_, count_even_
            )
            blocks = builder.sdiv(fewer, lanes)
            with cgutils.for_range(builder, blocks) as loop:
                move(builder.mul(loop.index, lanes), False)
            rest = builder.sub(
                builder.sdiv(builder.add(more, e.number(e.lanes - 1)), lanes), blocks
            )
            with cgutils.for_range(builder, rest) as loop:
                move(builder.mul(builder.add(loop.index, blocks), lanes), True)
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
                even, odd = _places(e.lanes, group)
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
"""Copy the groups with even and with odd index of a row to two runs of these counts.

Arguments: the array, at_even, count_even, at_odd, count_odd; the source, its offset and length.
Counts and length are those of elements. Only if a vector holds whole pairs, or one group."""
merge_by_1, merge_by_2, merge_by_4, merge_by_8 = map(_merge, GROUPS)
"""Join even and odd groups: y gets in turn one of x from at_x on, and one from at_x + phase on.

``length`` counts the elements of one parity. Both sides are read and written in whole vectors, so
they need a vector of spare elements. Only if a vector holds several groups."""
