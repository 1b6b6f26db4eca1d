"""Training steps as CUDA graphs: recorded once, then replayed as a whole, because a small network's
step consists mostly of launches.

A graph does the same work on the same memory each time. Everything that differs between steps must
therefore be in device memory beforehand. The batch and the arrays of the state are copied to arrays
with fixed addresses. The numbers of the state (``StepState``) become 0-dimensional arrays, int64 or
float64, which one launch sets from its arguments. The first steps of a kind run without a graph, so
that everything that is created once (gradients, optimizer state, tables, compiled kernels) exists
when the third step is recorded.

Memory: each kind of step has its own pool, which allocates nothing more once its graph is recorded.
Memory that was freed during the recording holds the intermediate results of the graph, which would
overwrite any other array in it. The graph may also still read memory that was freed later.

Order: a replay runs on the caller's stream, like any launch. A replay on another stream waits for
the previous one. Steps without a graph and recordings run on a separate stream, because the memory
of a pool belongs to a stream. That stream waits for the caller's stream before a step, and the
caller's stream waits for it afterwards.

The host's part of a replay is short, because a small network's step takes the device no longer. It
is one launch for the numbers, one copy per array of the batch, the graph, and one copy of the whole
result out of the graph's memory, where it is contiguous. If a step receives a result of the
previous step (``ok``), the graph itself writes it to the right place.
"""

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from struct import Struct
from typing import Any

import numpy as np

from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.backends.steps import arrays_of, code_of, place_of, rebuilt, sorted_out
from portacnn.ops.dispatch import kernel_choice, precision
from portacnn.runtime import Array, Backend

WARM = 2
"""The number of steps of a kind that run without a graph before one is recorded."""
MOST = 4
"""The most kinds with a graph; steps of other kinds run without one."""
_WORDS = 8
_ALIGNED = 16  # bytes; the alignment of the arrays of a result
_FILE = "words.cu"
VARIANTS: list[Variant] = [(_FILE, {})]
_log = logging.getLogger("portacnn")


class CapturedStep:
    """``step(*arrays, state)``, recorded and replayed. ``state`` is a dataclass; the head of this
    file explains how it is handled.

    The kind of a step is defined by the number, shapes, dtypes and memory order of its arrays, by
    the fields of the state that are neither numbers nor arrays, and by the kernel set and precision
    in use. A step may return arrays, and tuples and lists of them. A result that is passed in again
    as ``state.ok`` must not have been written to in between.

    Attributes:
        graphs: the number of kinds that are replayed.
        reason: why recording was given up, or None.
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
        self._last = self._stream  # the stream of the last work
        self._returned: list[Array] = []  # by the last call of the step

    @property
    def graphs(self) -> int:
        return sum(way.graph is not None for way in self._ways.values())

    def __call__(self, *arguments: Any) -> Any:
        *batch, state = arguments
        numbers, held, fixed = sorted_out(state, self._cp.ndarray)
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
        """Make a stream wait for the previous step and for the caller's queued work, which is
        usually on the same stream.
        """
        for other in (self._last, caller):
            if other != stream:
                self._before.record(other)
                stream.wait_event(self._before)

    def _start_over(self) -> None:
        """Drop all graphs and their memory. All, because a graph may use memory that was first
        another's.
        """
        self._ways.clear()
        self._others = self._cp.cuda.MemoryPool()

    def _set(self, numbers: dict[str, Any]) -> None:
        """Write the numbers to the device in one launch."""
        if len(numbers) > _WORDS:
            raise TypeError(
                f"expected a state of at most {_WORDS} numbers, got {', '.join(numbers)}"
            )
        if numbers:
            codes = "".join([code_of(type(value)) for value in numbers.values()])
            words = np.frombuffer(_packer(codes).pack(*numbers.values()), np.int64)
            launch = kernel(_FILE, "set_words", "float64")
            launch((1,), (_WORDS,), (self._words, np.int32(len(numbers)), *words))

    def _numbers(self, numbers: dict[str, Any]) -> dict[str, Array]:
        """Return the numbers as 0-dimensional device arrays, int64 or float64, always at the same
        address.
        """
        return {
            name: self._words[i : i + 1]
            .view(np.int64 if code_of(type(value)) == "q" else np.float64)
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
        """Run a step of a kind without a graph on the separate stream, or record its graph and
        replay it.
        """
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
        """Run the step, or record it, which executes nothing yet."""
        if way is None:
            return _as_it_is(step, arrays, self._others)
        way.calls += 1
        if way.calls <= WARM or self.reason is not None:
            return _as_it_is(step, arrays, way.pool)
        try:
            way.record(step, arrays, self._stream, self._returned)
            return None
        except Exception as error:
            reason = f"{place_of(error, __file__)}: {str(error) or type(error).__name__}"
        # Outside the except block, where no exception keeps the memory of the recording alive.
        # If the step fails here too, the error is not caused by recording, and recording is not
        # given up.
        result = _as_it_is(step, arrays, way.pool)
        self._give_up(reason)
        return result

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        _log.warning(
            "a training step on %s cannot be recorded as a CUDA graph; training continues without "
            "one, which is slower: %s",
            self._backend,
            self.reason,
        )


class _FromDevice:
    """Device memory for a pool.

    If a device is out of memory, a pool frees its unused memory and tries again. That must not
    happen during a recording, because the graph will use memory that the recorded part has freed.
    During a recording the allocation therefore fails at once.
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
                f"device out of memory: {size} bytes more do not fit while a step is recorded"
            ) from error


class _Way:
    """Steps of one kind: their memory pool, and their graph once it is recorded.

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
        # inputs that the graph itself sets for the next step -> the index in its result
        self._back: dict[int, int] = {}
        self._result: Any = None
        # per array of the result: shape, dtype, byte offset
        self._places: list[tuple[tuple[int, ...], Any, int]] = []
        self._whole: Array = None  # the buffer with the graph's result

    def record(
        self,
        step: Callable[[list[Array]], Any],
        arrays: list[Array],
        stream: Any,
        returned: list[Array],
    ) -> None:
        """Record the step on ``stream``, the current one. Nothing is executed yet.

        Args:
            returned: the result of the previous step. Its arrays that are passed in again need not
                be copied at a replay.

        Raises:
            The exception that prevents the recording. The stream then no longer records.
        """
        with self._cp.cuda.using_allocator(self.pool.malloc):
            # Copies of all arrays: the graph reads these addresses.
            inputs = [self._cp.empty_like(array) for array in arrays]
            collecting = gc.isenabled()
            # garbage collection might free arrays of other steps, which may have to wait for the
            # device
            gc.disable()
            self._source.recording = True
            try:
                stream.begin_capture()
                try:
                    result = step(inputs)
                    found = arrays_of(result, self._cp.ndarray)
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
        """Copy the arrays into one buffer; return it and the position of each array."""
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
        """Replay the step with these arrays on the current stream."""
        # allocated first, so that nothing has been done if memory runs out
        fresh = self._cp.empty(self._whole.shape, dtype=np.uint8)
        for number, (there, array) in enumerate(zip(self._inputs, arrays, strict=True)):
            back = self._back.get(number)
            if back is None or not self.returned or array is not self.returned[back]:
                there[...] = array
        self.graph.launch()
        fresh[...] = self._whole
        self.returned = self._views(fresh, self._places)
        return rebuilt(self._result, iter(self.returned))


_NO_MEMORY = 2  # cudaErrorMemoryAllocation


def _as_it_is(step: Callable[[list[Array]], Any], arrays: list[Array], pool: Any) -> Any:
    """Run the step without a graph, with memory of this pool. Before failing, free the unused
    memory of the default pool.
    """
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
    """End a failed recording without raising another error."""
    import cupy as cp

    with suppress(cp.cuda.runtime.CUDARuntimeError):
        stream.end_capture()


@lru_cache
def _packer(codes: str) -> Struct:
    return Struct(f"={codes}{(_WORDS - len(codes)) * 8}x")


def _kind(array: Array) -> tuple[Any, ...]:
    return array.shape, array.dtype, _order(array.strides), array.data.device_id


@lru_cache
def _order(strides: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(strides)), key=lambda axis: -strides[axis]))


def _coming_back(arrays: list[Array], returned: list[Array], found: list[Array]) -> dict[int, int]:
    """Map each argument that is a result of the previous step to its index there, if shape and
    dtype are unchanged.
    """
    return {
        place: number
        for place, array in enumerate(arrays)
        for number, before in enumerate(returned[: len(found)])
        if array is before
        and (array.shape, array.dtype) == (found[number].shape, found[number].dtype)
    }


def _copied(result: Any, copies: list[Array]) -> Any:
    """Return copies of the arrays, made on the current stream, and append them to the list."""
    import cupy as cp

    if isinstance(result, tuple | list):
        return type(result)(_copied(part, copies) for part in result)
    if not isinstance(result, cp.ndarray):
        return result
    copies.append(result.copy())
    return copies[-1]
