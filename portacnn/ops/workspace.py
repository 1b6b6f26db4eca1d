"""Reused memory: one arena for all passes of a network, reused by lifetime.

New memory is expensive. The operating system maps a large array page by page at the first access,
which can take as long as computing its contents. Inside ``run_in(workspace, ...)`` the kernels of a
backend therefore allocate results and temporaries in the workspace. The bytes of an array are free
again when nothing refers to it or to a view of it. An array in use is never overwritten, even if it
outlives the pass or an exception.

The arena is slightly larger than the largest pass so far. An array that does not fit gets its own
memory, and the next pass finds a larger arena. A workspace has no state between two calls that
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

_ALIGNED = 64  # bytes: every array is aligned to a cache line
# The arena exceeds the largest pass by 1 / _SPARE, so that slightly larger passes do not replace
# it.
_SPARE = 16
_END = sys.maxsize


class Memory(NamedTuple):
    """How a library creates arrays.

    Attributes:
        fresh: (shape, dtype) -> an array in its own memory.
        allocate: (nbytes) -> a buffer.
        view: (buffer, offset, shape, dtype) -> an array in the buffer. Every view of that array
            keeps the array itself alive.
    """

    fresh: Callable[[tuple[int, ...], Any], Array]
    allocate: Callable[[int], Any]
    view: Callable[[Any, int, tuple[int, ...], Any], Array]


class _Loan(ref):
    """A weak reference to an array in the workspace. When the array dies, its bytes are free."""

    __slots__ = ("start", "stop")
    start: int
    stop: int


class Workspace:
    """Memory for the passes of one network, one at a time.

    Addresses continue beyond the end of the arena. An array there gets its own memory but is
    counted as if it lay at its address. So ``_top``, the highest address, is the size that the
    arena should have had.
    """

    def __init__(self) -> None:
        self.size = 0
        """The size of the arena in bytes."""
        self.version = 0
        """The number of earlier arenas."""
        self._top = 0
        self._arena: Any = None
        self._holes: list[tuple[int, int]] = []  # free bytes (start, stop), by address
        self._loans: dict[int, _Loan] = {}  # by start
        # loans whose arrays are dead; Python appends to it, in any thread
        self._returned: deque[_Loan] = deque()

    def begin(self, reserved: int = 0) -> None:
        """Prepare for a pass that does not use the first ``reserved`` bytes.

        Call ``grow(reserved)`` before, so that no array in use lies there.
        """
        if self._returned:
            self._collect([])
        loans = (
            sorted((loan.start, loan.stop) for loan in self._loans.values()) if self._loans else []
        )
        if self._top > self.size:
            self._replace()
            loans = []
        holes, at = [], reserved
        for start, stop in loans:
            holes.append((at, start))
            at = stop
        self._holes = [*holes, (at, _END)]

    def grow(self, size: int = 0) -> None:
        """Replace the arena if it is smaller than ``size``, or smaller than the last pass needed,
        or if an array in use lies in its first ``size`` bytes.
        """
        if self._returned:
            self._collect([])
        self._top = max(self._top, size)
        if self._top > self.size or (self._loans and min(self._loans) < size):
            self._replace()

    def _replace(self) -> None:
        # The order matters: if an interruption comes in between, the bytes of a live array are not
        # allocated again. The old arena lives as long as arrays in it do.
        self._arena, self._holes = None, []
        self._loans, self._returned = {}, deque()
        self.size, self.version = self._top + self._top // _SPARE, self.version + 1

    def take(self, memory: Memory, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an uninitialized array."""
        size = _size(shape, dtype)
        # if an interruption comes in between, the bytes are not allocated twice
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
        """Add the bytes of dead arrays to the free ranges, and merge adjacent ranges."""
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
    """Places of the arrays that prepared functions use in each call. All plans of a workspace share
    the same bytes.

    The arrays that a function keeps between calls come first, then the temporaries, which all
    functions share. Their contents are lost when functions of another plan or an ordinary pass have
    run; ``restore`` fills those that must be zero.

    Args:
        workspace: None makes a plan that only measures; its arrays have their own memory.
        kept: the bytes of the kept arrays, as measured by a plan for the same functions.
    """

    def __init__(self, workspace: Workspace | None = None, kept: int = 0) -> None:
        self._workspace, self._temporaries_at = workspace, kept
        self.kept = self.temporary = 0
        self._zeros: list[Array] = []

    @property
    def size(self) -> int:
        """The number of bytes used at the start of the arena."""
        return self.kept + self.temporary

    def keep(self, memory: Memory, shape: tuple[int, ...], dtype: Any, zeros: bool) -> Array:
        """Allocate a kept array; see ``reserve``."""
        array = self._at(memory, self.kept, shape, dtype)
        self.kept += _size(shape, dtype)
        if zeros:
            array[...] = 0
            self._zeros.append(array)
        return array

    def lend(self, memory: Memory, shapes: Sequence[tuple[int, ...]], dtype: Any) -> list[Array]:
        """Allocate temporaries; see ``temporaries``."""
        arrays, stop = [], 0
        for shape in shapes:
            arrays.append(self._at(memory, self._temporaries_at + stop, shape, dtype))
            stop += _size(shape, dtype)
        self.temporary = max(self.temporary, stop)
        return arrays

    def _at(self, memory: Memory, start: int, shape: tuple[int, ...], dtype: Any) -> Array:
        if self._workspace is None:
            return memory.fresh(shape, dtype)
        return memory.view(self._workspace._buffer(memory), start, shape, dtype)

    def restore(self) -> None:
        """Fill the arrays that were reserved as zeros."""
        for array in self._zeros:
            array[...] = 0


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    return -(-prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED or _ALIGNED


class _Current(local):
    """The workspace and the plan that are active in this thread."""

    workspace: Workspace | None = None
    plan: Plan | None = None


_current = _Current()


def run_in(
    workspace: Workspace, function: Callable[..., Any], *arguments: Any, reserved: int = 0
) -> Any:
    """Return ``function(*arguments)``, whose kernels allocate memory in ``workspace``.

    The first ``reserved`` bytes are not used. One pass at a time, in this thread.
    """
    before = _current.workspace
    # A context manager could be interrupted between entering and its block.
    try:
        try:
            workspace.begin(reserved)
            _current.workspace = workspace
            return function(*arguments)
        finally:
            _current.workspace = before
    finally:
        # again, because a signal handler may have interrupted the first assignment
        _current.workspace = before


@contextmanager
def planning(plan: Plan) -> Iterator[None]:
    """Make ``reserve`` and ``temporaries`` allocate by ``plan`` inside a ``with`` block. Other
    results have their own memory.
    """
    before = _current.workspace, _current.plan
    try:
        _current.workspace, _current.plan = None, plan
        yield
    finally:
        _current.workspace, _current.plan = before


def current() -> Workspace | None:
    """Return the workspace of the pass that runs in this thread, or None."""
    return _current.workspace


def reserve(memory: Memory, shape: tuple[int, ...], dtype: Any, *, zeros: bool = False) -> Array:
    """Return an array that a prepared function uses in each call; with ``zeros`` it is zero before
    the first call.

    Its values stay between two calls, unless another prepared function or an ordinary pass of the
    network has run. Then arrays reserved with ``zeros`` are zero again, and the contents of others
    are undefined.
    """
    return (_current.plan or Plan()).keep(memory, shape, dtype, zeros)


def temporaries(memory: Memory, *shapes: tuple[int, ...], dtype: Any) -> list[Array]:
    """Return arrays that a prepared function writes and reads within one call. Other functions use
    the same bytes.
    """
    return (_current.plan or Plan()).lend(memory, shapes, dtype)
