"""A training step as a CUDA graph: recorded once, then launched whole, since a small network's step
is mostly launches.

A graph does the same work on the same memory each time. So whatever differs from step to step has
to be in the device's memory beforehand: the batch and the state's arrays are copied into arrays
that stay, and the state's numbers (``StepState``) become 0-dimensional arrays, int64 or float64,
which one launch sets from its arguments. The first steps of a kind run as they are, so that
everything that is made only once (gradients, an optimizer's state, tables, compiled kernels) is
there when the third is recorded.

Memory: a kind of step has a pool of its own, from which nothing is taken any more once its graph is
recorded. What was freed during the recording is where the graph keeps its intermediate results, and
anybody else's array in it would be overwritten; and what was freed since may still be read by it.

Order: a replay runs on the caller's stream, like any launch of its own; one on another stream waits
for the one before. Steps that run as they are, and recordings, have a stream of their own, for the
memory of a pool belongs to a stream. It waits for the caller's stream before a step, and the
caller's waits for it after.

The host's part of a replay is short, as a small network's step takes the device no longer than it:
one launch for the numbers, a copy for each array of the batch, the graph, and one copy of the whole
result out of the graph's memory, where it lies in one piece. What a step gave back and the next
gets (``ok``) the graph itself leaves where it will look for it.
"""

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from struct import Struct
from typing import Any

import numpy as np

from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.ops.dispatch import Op, kernel_choice, precision
from portacnn.runtime import Array, Backend

WARM = 2
"""How many steps of a kind run as they are before one is recorded."""
MOST = 4
"""How many kinds get a graph; steps of any other run as they are."""
_WORDS = 8
_ALIGNED = 16  # bytes: every array of a result begins at a multiple of it
_FILE = "words.cu"
VARIANTS: list[Variant] = [(_FILE, {})]
_log = logging.getLogger("portacnn")


class _UncapturableError(Exception):
    """Why a step that ran through its recording cannot be replayed."""


class CapturedStep:
    """``step(*arrays, state)``, recorded and replayed. ``state`` is a dataclass; see the head of
    this file for what becomes of it.

    A step whose arrays differ in number, shape, dtype or order in memory is of another kind, and so
    is one whose state differs in anything but numbers and arrays, and one under other kernels or
    another precision. The step may give back arrays, and tuples and lists of them. One that it gave
    back and gets again, as ``state.ok``, must not have been written to in between.

    Attributes:
        graphs: how many kinds are replayed by now.
        reason: why nothing is recorded any more; None as long as nothing has failed.
    """

    def __init__(self, backend: Backend, step: Callable[..., Any]) -> None:
        import cupy as cp

        self._backend, self._step, self._cp = backend, step, cp
        self.reason: str | None = None
        self._ways: dict[Any, _Way] = {}
        with backend.active():
            self._stream = cp.cuda.Stream(non_blocking=True)
            self._before, self._after = (cp.cuda.Event(disable_timing=True) for _ in range(2))
            self._others = cp.cuda.MemoryPool()
            self._words = cp.empty((_WORDS,), dtype=np.int64)
        self._last = self._stream  # where the last work was queued
        self._returned: list[Array] = []  # by the last call

    @property
    def graphs(self) -> int:
        return sum(way.graph is not None for way in self._ways.values())

    def __call__(self, *arguments: Any) -> Any:
        *batch, state = arguments
        numbers, held, fixed = _sorted_out(state, self._cp.ndarray)
        arrays = [*batch, *held.values()]
        key = (len(batch), fixed, tuple(map(_kind, arrays)), kernel_choice(), precision())
        way = self._ways.get(key)
        with self._backend.active():
            try:
                if way is not None and way.graph is not None:
                    caller = self._cp.cuda.get_current_stream()
                    self._follow(caller, caller)
                    self._last = caller
                    self._set(numbers)
                    result = way.replay(arrays)
                    self._returned = way.returned
                    return result

                def step(arrays: list[Array]) -> Any:
                    own = dict(zip(held, arrays[len(batch) :], strict=True))
                    return self._step(
                        *arrays[: len(batch)], replace(state, **self._numbers(numbers), **own)
                    )

                return self._run(key, step, arrays, numbers)
            except MemoryError:
                self._start_over()
                raise
            except self._cp.cuda.runtime.CUDARuntimeError as error:
                if error.status != _NO_MEMORY:
                    raise
                self._start_over()
                raise MemoryError(str(error)) from error

    def _follow(self, stream: Any, caller: Any) -> None:
        """Have a stream wait for the step before and for what its caller has queued: which is
        nothing to wait for mostly."""
        for other in (self._last, caller):
            if other != stream:
                self._before.record(other)
                stream.wait_event(self._before)

    def _start_over(self) -> None:
        """Let go of all graphs and their memory. Of all: one may look at memory that was first
        another's."""
        self._ways.clear()
        self._others = self._cp.cuda.MemoryPool()

    def _set(self, numbers: dict[str, Any]) -> None:
        """Put the numbers onto the device, all in one launch."""
        if len(numbers) > _WORDS:
            raise TypeError(
                f"a state has {_WORDS} numbers at most, this one has {', '.join(numbers)}"
            )
        if numbers:
            codes = "".join([_code(type(value)) for value in numbers.values()])
            words = np.frombuffer(_packer(codes).pack(*numbers.values()), np.int64)
            launch = kernel(_FILE, "set_words", "float64")
            launch((1,), (_WORDS,), (self._words, np.int32(len(numbers)), *words))

    def _numbers(self, numbers: dict[str, Any]) -> dict[str, Array]:
        """The numbers where ``_set`` puts them: 0-dimensional arrays, int64 or float64, always at
        the same address."""
        return {
            name: self._words[i : i + 1]
            .view(np.int64 if _code(type(value)) == "q" else np.float64)
            .reshape(())
            for i, (name, value) in enumerate(numbers.items())
        }

    def _run(
        self,
        key: Any,
        step: Callable[[list[Array]], Any],
        arrays: list[Array],
        numbers: dict[str, Any],
    ) -> Any:
        """A step of a kind that has no graph yet, on the own stream; or one that gets its graph
        now."""
        way = self._ways.get(key)
        if way is None and len(self._ways) < MOST and self.reason is None:
            way = self._ways[key] = _Way()
        caller = self._cp.cuda.get_current_stream()
        self._follow(self._stream, caller)
        try:
            with self._stream:
                self._set(numbers)
                result = self._without_graph(way, step, arrays)
        finally:
            self._after.record(self._stream)
            caller.wait_event(self._after)
            self._last = caller
        if way is not None and way.graph is not None:
            result = way.replay(arrays)
            self._returned = way.returned
            return result
        self._returned = []
        return _copied(result, self._returned)

    def _without_graph(
        self, way: "_Way | None", step: Callable[[list[Array]], Any], arrays: list[Array]
    ) -> Any:
        """Do the step as it is, or record it, which does nothing yet."""
        if way is None:
            return _as_it_is(step, arrays, self._others)
        way.calls += 1
        if way.calls <= WARM or self.reason is not None:
            return _as_it_is(step, arrays, way.pool)
        try:
            way.record(step, arrays, self._stream, self._returned)
            return None
        except Exception as error:
            reason = f"{_place(error)}: {str(error) or type(error).__name__}"
        # Out here, where no error holds what the recording had taken.
        # if it fails like this too, there is nothing to give up for
        result = _as_it_is(step, arrays, way.pool)
        self._give_up(reason)
        return result

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        _log.warning(
            "a training step on %s cannot be recorded as a CUDA graph and goes on launch by "
            "launch, which is slower: %s",
            self._backend,
            self.reason,
        )


class _FromDevice:
    """Memory of the device for a pool, which first hands out what it has.

    Where there is none left, a pool gives back what lies in it unused and tries again. While a step
    is recorded that must not be: what the recorded part has freed lies there, and the graph goes on
    using it. So then there is none left at once.
    """

    recording = False

    def __call__(self, size: int) -> Any:
        import cupy as cp

        try:
            return cp.cuda.MemoryPointer(cp.cuda.Memory(size), 0)
        except cp.cuda.runtime.CUDARuntimeError as error:
            if not self.recording or error.status != _NO_MEMORY:
                raise
            raise MemoryError(
                f"the device has no room for {size} bytes more beside what is recorded"
            ) from error


class _Way:
    """Steps of one kind: their memory, and their graph once it is recorded.

    Attributes:
        returned: the arrays of the last replay's result, in order.
    """

    def __init__(self) -> None:
        import cupy as cp

        self._cp = cp
        self._source = _FromDevice()
        self.pool = cp.cuda.MemoryPool(self._source)
        self.calls = 0
        self.graph: Any = None
        self.returned: list[Array] = []
        self._inputs: list[Array] = []
        self._back: dict[
            int, int
        ] = {}  # inputs that the graph itself sets for the next step: to which array of its result
        self._result: Any = None
        # of the result's arrays: shape, dtype, byte
        self._places: list[tuple[tuple[int, ...], Any, int]] = []
        self._whole: Array = None  # where the graph leaves its result

    def record(
        self,
        step: Callable[[list[Array]], Any],
        arrays: list[Array],
        stream: Any,
        returned: list[Array],
    ) -> None:
        """Have ``stream``, the current one, record the step, of which nothing is done yet.

        Args:
            returned: what the step before gave back. What of it comes again as an argument need not
                be copied at a replay.

        Raises:
            Whatever keeps it from being recorded. The stream no longer records then.
        """
        with self._cp.cuda.using_allocator(self.pool.malloc):
            # A copy even of what lies still: it is at this address that the graph looks.
            inputs = [self._cp.empty_like(array) for array in arrays]
            collecting = gc.isenabled()
            # what it might free belongs to other steps, and freeing it may have to wait for the
            # device
            gc.disable()
            self._source.recording = True
            try:
                stream.begin_capture()
                try:
                    result = step(inputs)
                    found = _arrays(result)
                    whole, places = self._gathered(found)
                    back = _coming_back(arrays, returned, found)
                    for place, number in back.items():
                        inputs[place][...] = found[number]
                except BaseException:
                    _end_quietly(stream)
                    raise
                graph = stream.end_capture()
            finally:
                self._source.recording = False
                if collecting:
                    gc.enable()
        self.graph, self._inputs, self._back = graph, inputs, back
        self._result, self._whole, self._places = result, whole, places

    def _gathered(self, found: list[Array]) -> tuple[Array, list[tuple[tuple[int, ...], Any, int]]]:
        """Copies of the arrays in one, and where each is in it."""
        places, end = [], 0
        for array in found:
            places.append((array.shape, array.dtype, end))
            end += -(-array.nbytes // _ALIGNED) * _ALIGNED
        whole = self._cp.empty((max(end, 1),), dtype=np.uint8)
        for array, view in zip(found, self._views(whole, places), strict=True):
            view[...] = array
        return whole, places

    def _views(self, whole: Array, places: list[tuple[tuple[int, ...], Any, int]]) -> list[Array]:
        return [
            self._cp.ndarray(shape, dtype, whole.data + begin) for shape, dtype, begin in places
        ]

    def replay(self, arrays: list[Array]) -> Any:
        """The step on these arrays, on the current stream."""
        # first: without room for the result, nothing is done
        fresh = self._cp.empty(self._whole.shape, dtype=np.uint8)
        for number, (there, array) in enumerate(zip(self._inputs, arrays, strict=True)):
            back = self._back.get(number)
            if back is None or not self.returned or array is not self.returned[back]:
                there[...] = array
        self.graph.launch()
        fresh[...] = self._whole
        self.returned = self._views(fresh, self._places)
        return _rebuilt(self._result, iter(self.returned))


_NO_MEMORY = 2  # cudaErrorMemoryAllocation


def _as_it_is(step: Callable[[list[Array]], Any], arrays: list[Array], pool: Any) -> Any:
    """The step, launch by launch, with memory of this pool; before there is none left, that of the
    pool for all else is let go."""
    import cupy as cp

    def malloc(size: int) -> Any:
        try:
            return pool.malloc(size)
        except cp.cuda.memory.OutOfMemoryError:
            cp.get_default_memory_pool().free_all_blocks()
            return pool.malloc(size)

    with cp.cuda.using_allocator(malloc):
        return step(arrays)


def _end_quietly(stream: Any) -> None:
    """End a recording that has failed; that it has failed is known."""
    import cupy as cp

    with suppress(cp.cuda.runtime.CUDARuntimeError):
        stream.end_capture()


@lru_cache
def _names(kind: type) -> tuple[str, ...]:
    if not is_dataclass(kind):
        raise TypeError(f"the last argument of a step is a dataclass, got {kind.__name__}")
    return tuple(item.name for item in fields(kind))


@lru_cache
def _code(kind: type) -> str:
    """How ``struct`` packs a number of this type: "q" as int64, "d" as float64; "" where it is
    none."""
    if issubclass(kind, bool) or not issubclass(kind, Real):
        return ""
    return "q" if issubclass(kind, Integral) else "d"


@lru_cache
def _packer(codes: str) -> Struct:
    return Struct(f"={codes}{(_WORDS - len(codes)) * 8}x")


def _sorted_out(state: Any, kind: type) -> tuple[dict[str, Any], dict[str, Array], tuple[Any, ...]]:
    """A state's fields by name: numbers, arrays (of this kind), and all else."""
    numbers: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    fixed = [type(state)]
    for name in _names(type(state)):
        value = getattr(state, name)
        if isinstance(value, kind):
            arrays[name] = value
        elif code := _code(type(value)):
            numbers[name] = value
            fixed += name, code
        else:
            fixed += name, value
    return numbers, arrays, tuple(fixed)


def _kind(array: Array) -> tuple[Any, ...]:
    return array.shape, array.dtype, _order(array.strides), array.data.device_id


@lru_cache
def _order(strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))


def _arrays(result: Any) -> list[Array]:
    """A result's arrays, in order. Raises _UncapturableError where a replay could not give it back
    anew."""
    import cupy as cp

    if isinstance(result, tuple | list):
        return [array for part in result for array in _arrays(part)]
    if not isinstance(result, cp.ndarray):
        raise _UncapturableError(
            f"it gives back a {type(result).__name__}, which would be the same each time"
        )
    return [result]


def _coming_back(arrays: list[Array], returned: list[Array], found: list[Array]) -> dict[int, int]:
    """Which arguments are what the step before gave back, and which array of its result: those that
    stay of one kind."""
    return {
        place: number
        for place, array in enumerate(arrays)
        for number, before in enumerate(returned[: len(found)])
        if array is before
        and (array.shape, array.dtype) == (found[number].shape, found[number].dtype)
    }


def _rebuilt(result: Any, fresh: Iterator[Array]) -> Any:
    """A result like this one of other arrays."""
    return (
        type(result)(_rebuilt(part, fresh) for part in result)
        if isinstance(result, tuple | list)
        else next(fresh)
    )


def _copied(result: Any, copies: list[Array]) -> Any:
    """Arrays of their own, on the current stream; they are put on the list, too."""
    import cupy as cp

    if isinstance(result, tuple | list):
        return type(result)(_copied(part, copies) for part in result)
    if not isinstance(result, cp.ndarray):
        return result
    copies.append(result.copy())
    return copies[-1]


def _place(error: BaseException) -> str:
    """Where it happened: in which op, the innermost; else in which function of ours; else in which
    one of the step's."""
    op, ours, first = "", "", ""
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        code = frame.f_code
        if (
            code.co_filename != __file__
        ):  # a frame whose locals are looked at keeps them: that of ``_run`` would keep the error
            holder = frame.f_locals.get("self")
            if isinstance(holder, Op):
                op = f"{holder.name}_backward" if code.co_name == "run" else holder.name
            else:
                first = first or code.co_qualname
                if frame.f_globals.get("__name__", "").startswith("portacnn."):
                    ours = code.co_qualname
        traceback = traceback.tb_next
    return op or ours or first or "the step"
