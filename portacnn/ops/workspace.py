"""Memory that is used again: one arena for all passes of a network, reused by lifetime.

Fresh memory is expensive: the system hands out a large array page by page, at its first touch, and
that can cost as much as what is computed into it. Inside ``run_in(workspace, ...)`` a backend's
kernels therefore take the memory for their results and temporaries from the workspace. An array's
bytes are free again as soon as nothing refers to it or to a view of it. So an array can never be
overwritten while somebody holds it, not even one that outlives the pass or an exception.

The arena is as large as the largest pass so far, and a little more. What does not fit gets memory
of its own, and the next pass finds a larger arena. Between two calls a workspace has no state that
could be wrong: after an exception it may be used again or dropped.
"""

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from threading import local
from typing import Any, NamedTuple
from weakref import ref

from portacnn.runtime import Array

_ALIGNED = 64  # bytes: where an array begins, at a line of the cache
# The arena is larger than the largest pass by 1 / _SPARE of it, so that slightly larger passes do
# not replace it.
_SPARE = 16
_END = sys.maxsize


class Memory(NamedTuple):
    """How a library makes arrays.

    Attributes:
        fresh: (shape, dtype) -> an array in memory of its own.
        allocate: (nbytes) -> a buffer.
        view: (buffer, offset, shape, dtype) -> an array in the buffer. Every view of that array
            keeps the array itself alive.
    """

    fresh: Callable[[tuple[int, ...], Any], Array]
    allocate: Callable[[int], Any]
    view: Callable[[Any, int, tuple[int, ...], Any], Array]


class _Loan(ref):
    """An array that was handed out, seen from the workspace: when the array dies, its bytes are
    free."""

    __slots__ = ("start", "stop")
    start: int
    stop: int


class Workspace:
    """Memory for the passes of one network, one at a time.

    Addresses go on behind the arena's end. There an array gets memory of its own, but is counted as
    if it lay at its address, so ``_top``, the highest address, is the size that the arena should
    have had.
    """

    def __init__(self) -> None:
        self.size = 0
        """Bytes of the arena."""
        self.version = 0
        """How many arenas there were before this one."""
        self._top = 0
        self._arena: Any = None
        self._holes: list[tuple[int, int]] = []  # free bytes (start, stop), by address
        self._loans: dict[int, _Loan] = {}  # by start
        # whose arrays have died: appended to by the interpreter, in any thread
        self._returned: deque[_Loan] = deque()

    def begin(self, reserved: int = 0) -> None:
        """Prepare for a pass that leaves the first ``reserved`` bytes alone."""
        if self._returned:
            self._collect([])
        loans = (
            sorted((loan.start, loan.stop) for loan in self._loans.values()) if self._loans else []
        )
        if self._top > self.size or (loans and loans[0][0] < reserved):
            self._replace()
            loans = []
        holes, at = [], reserved
        for start, stop in loans:
            holes.append((at, start))
            at = stop
        self._holes = [*holes, (at, _END)]

    def grow(self, size: int = 0) -> None:
        """Replace the arena if it is smaller than ``size``, or than the last pass would have
        needed."""
        self._top = max(self._top, size)
        if self._top > self.size:
            self._replace()

    def _replace(self) -> None:
        # In this order: whatever comes in between, no bytes are handed out that a living array has.
        # The old arena lives on as long as arrays in it do.
        self._arena, self._holes = None, []
        self._loans, self._returned = {}, deque()
        self.size, self.version = self._top + self._top // _SPARE, self.version + 1

    def take(self, memory: Memory, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array with whatever its bytes last held."""
        size = _size(shape, dtype)
        # whatever comes in between, nobody gets the same bytes
        holes, self._holes = self._holes, []
        if self._returned:
            self._collect(holes)
        index = 0
        for start, stop in holes:
            if stop - start >= size:
                break
            index += 1
        else:
            return memory.fresh(shape, dtype)
        end = start + size
        if end == stop:
            del holes[index]
        else:
            holes[index] = end, stop
        self._holes = holes
        self._top = max(self._top, end)
        array = (
            memory.fresh(shape, dtype)
            if end > self.size
            else memory.view(self._buffer(memory), start, shape, dtype)
        )
        loan = _Loan(array, self._returned.append)
        loan.start, loan.stop = start, end
        self._loans[start] = loan
        return array

    def _collect(self, holes: list[tuple[int, int]]) -> None:
        """Add the bytes of arrays that have died to the holes, and join those that touch."""
        while self._returned:
            loan = self._returned[0]
            if self._loans.get(loan.start) is loan:
                del self._loans[loan.start]
            self._returned.popleft()
            start, stop, index = loan.start, loan.stop, 0
            while index < len(holes) and holes[index][1] < start:
                index += 1
            if index < len(holes) and holes[index][1] == start:
                start = holes.pop(index)[0]
            if index < len(holes) and holes[index][0] == stop:
                stop = holes.pop(index)[1]
            holes.insert(index, (start, stop))

    def _buffer(self, memory: Memory) -> Any:
        if self._arena is None:
            self._arena = memory.allocate(self.size)
        return self._arena


class Plan:
    """Places for the arrays that prepared functions use at each call: the same bytes for every plan
    of a workspace.

    First those that a function keeps from one call to the next, then the temporaries, where all
    functions have theirs. What lies there is lost when another plan's functions have run, or an
    ordinary pass: ``restore`` zeros what has to be zero.

    Args:
        room: whose bytes; None for a plan that only measures, whose arrays have memory of their
            own.
        kept: the bytes of what is kept, as a plan for the same functions has measured them.
    """

    def __init__(self, room: Workspace | None = None, kept: int = 0) -> None:
        self._room, self._temporaries_at = room, kept
        self.kept = self.temporary = 0
        self._zeros: list[Array] = []

    @property
    def size(self) -> int:
        """The bytes that it takes at the arena's start."""
        return self.kept + self.temporary

    def keep(self, memory: Memory, shape: tuple[int, ...], dtype: Any, zeros: bool) -> Array:
        """See ``reserve``."""
        array = self._at(memory, self.kept, shape, dtype)
        self.kept += _size(shape, dtype)
        if zeros:
            array[...] = 0
            self._zeros.append(array)
        return array

    def lend(self, memory: Memory, shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Array]:
        """See ``temporaries``."""
        arrays, stop = [], 0
        for shape in shapes:
            arrays.append(self._at(memory, self._temporaries_at + stop, shape, dtype))
            stop += _size(shape, dtype)
        self.temporary = max(self.temporary, stop)
        return arrays

    def _at(self, memory: Memory, start: int, shape: tuple[int, ...], dtype: Any) -> Array:
        if self._room is None:
            return memory.fresh(shape, dtype)
        return memory.view(self._room._buffer(memory), start, shape, dtype)

    def restore(self) -> None:
        """Zero the arrays that were reserved as zeros."""
        for array in self._zeros:
            array[...] = 0


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    return -(-prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED or _ALIGNED


class _Current(local):
    """What is in force in this thread."""

    workspace: Workspace | None = None
    plan: Plan | None = None


_current = _Current()


def run_in(
    room: Workspace, function: Callable[..., Any], *arguments: Any, reserved: int = 0
) -> Any:
    """``function(*arguments)``, whose kernels take memory from ``room``, except for its first
    ``reserved`` bytes.

    One pass at a time, in this thread.
    """
    before = _current.workspace
    # a function, and not a context manager: those can be interrupted between entering and the block
    try:
        try:
            room.begin(reserved)
            _current.workspace = room
            return function(*arguments)
        finally:
            _current.workspace = before
    finally:
        # again: a signal handler may have raised before the first time was through
        _current.workspace = before


@contextmanager
def planning(plan: Plan) -> Iterator[None]:
    """Inside it, ``reserve`` and ``temporaries`` take memory by ``plan``; other results have memory
    of their own."""
    before = _current.workspace, _current.plan
    try:
        _current.workspace, _current.plan = None, plan
        yield
    finally:
        _current.workspace, _current.plan = before


def current() -> Workspace | None:
    """The workspace of the pass that is running in this thread."""
    return _current.workspace


def reserve(memory: Memory, shape: tuple[int, ...], dtype: Any, *, zeros: bool = False) -> Array:
    """An array that a prepared function uses again at each call; with ``zeros``, full of them
    before the first.

    Between two calls its values stay, unless another prepared function or an ordinary pass of the
    network has run: then those reserved as ``zeros`` are zeros again, and others hold anything.
    """
    return (_current.plan or Plan()).keep(memory, shape, dtype, zeros)


def temporaries(memory: Memory, *shapes: tuple[int, ...], dtype: Any) -> list[Array]:
    """Arrays that a prepared function writes and reads within one call; other functions use the
    same bytes in theirs."""
    return (_current.plan or Plan()).lend(memory, shapes, dtype)
