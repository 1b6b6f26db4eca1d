"""A training step as a CUDA graph: recorded once, then launched whole, since a small network's step is mostly launches.

A graph does the same work on the same memory each time. So whatever differs from step to step has to be in the device's memory
beforehand: the batch and the state's arrays are copied into arrays that stay, and the state's numbers (``StepState``) become
0-dimensional arrays, int64 or float64, which one launch sets from its arguments. The first steps of a kind run as they are, so that
everything that is made only once (gradients, an optimizer's state, tables, compiled kernels) is there when the third is recorded.

Memory: a kind of step has a pool of its own, from which nothing is taken any more once its graph is recorded. What was freed
during the recording is where the graph keeps its intermediate results, and anybody else's array in it would be overwritten;
and what was freed since may still be read by it.

Order: everything runs on one stream. It waits for the caller's stream before a step, and the caller's waits for it after, so that
to the caller a step is like any launch of its own. What a step gives back is copied there, out of the graph's memory.
"""

import gc
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from numbers import Integral, Real
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
_FILE = "words.cu"
VARIANTS: list[Variant] = [(_FILE, {})]
_log = logging.getLogger("portacnn")


class _UncapturableError(Exception):
    """Why a step that ran through its recording cannot be replayed."""


class CapturedStep:
    """``step(*arrays, state)``, recorded and replayed. ``state`` is a dataclass; see the head of this file for what becomes of it.

    A step whose arrays differ in number, shape, dtype or order in memory is of another kind, and so is one whose state differs in
    anything but numbers and arrays, and one under other kernels or another precision. The step may give back arrays, and tuples
    and lists of them.

    Attributes:
        graphs: how many kinds are replayed by now.
        reason: why nothing is recorded any more; None as long as nothing has failed.
    """

    def __init__(self, backend: Backend, step: Callable[..., Any]) -> None:
        import cupy as cp

        self._backend, self._step = backend, step
        self.reason: str | None = None
        self._ways: dict[Any, _Way] = {}
        with backend.active():
            self._stream = cp.cuda.Stream(non_blocking=True)
            self._before, self._after = (cp.cuda.Event(disable_timing=True) for _ in range(2))
            self._others = cp.cuda.MemoryPool()
            self._words = cp.empty((_WORDS,), dtype=np.int64)

    @property
    def graphs(self) -> int:
        return sum(way.graph is not None for way in self._ways.values())

    def __call__(self, *arguments: Any) -> Any:
        import cupy as cp

        *batch, state = arguments
        if not is_dataclass(state):
            raise TypeError(f"the last argument of a step is a dataclass, got {type(state).__name__}")
        numbers, held, fixed = _sorted_out(state)
        arrays = [*batch, *held.values()]
        key = (len(batch), fixed, tuple(map(_kind, arrays)), kernel_choice(), precision())
        with self._backend.active():
            caller = cp.cuda.get_current_stream()
            self._before.record(caller)
            self._stream.wait_event(self._before)
            try:
                with self._stream:
                    there = self._set(numbers)

                    def step(arrays: list[Array]) -> Any:
                        own = dict(zip(held, arrays[len(batch) :], strict=True))
                        return self._step(*arrays[: len(batch)], replace(state, **there, **own))

                    result = self._run(key, step, arrays)
            except MemoryError:
                self._start_over()
                raise
            except cp.cuda.runtime.CUDARuntimeError as error:
                if error.status != _NO_MEMORY:
                    raise
                self._start_over()
                raise MemoryError(str(error)) from error
            finally:
                self._after.record(self._stream)
                caller.wait_event(self._after)
            return _copied(result)

    def _start_over(self) -> None:
        """Let go of all graphs and their memory. Of all: one may look at memory that was first another's."""
        import cupy as cp

        self._ways.clear()
        self._others = cp.cuda.MemoryPool()

    def _set(self, numbers: dict[str, Any]) -> dict[str, Array]:
        """Put the numbers onto the device, all in one launch; each as a 0-dimensional array, always at the same address."""
        if len(numbers) > _WORDS:
            raise TypeError(f"a state has {_WORDS} numbers at most, this one has {', '.join(numbers)}")
        whole = {name: isinstance(value, Integral) for name, value in numbers.items()}
        words = [
            np.int64(value) if whole[name] else np.float64(value).view(np.int64) for name, value in numbers.items()
        ]
        if words:
            padding = [np.int64(0)] * (_WORDS - len(words))
            launch = kernel(_FILE, "set_words", "float64")
            launch((1,), (_WORDS,), (self._words, np.int32(len(words)), *words, *padding))
        return {
            name: self._words[i : i + 1].view(np.int64 if whole[name] else np.float64).reshape(())
            for i, name in enumerate(numbers)
        }

    def _run(self, key: Any, step: Callable[[list[Array]], Any], arrays: list[Array]) -> Any:
        way = self._ways.get(key)
        if way is None and len(self._ways) < MOST and self.reason is None:
            way = self._ways[key] = _Way()
        if way is None:
            return _as_it_is(step, arrays, self._others)
        if way.graph is not None:
            return way.replay(arrays)
        way.calls += 1
        if way.calls <= WARM or self.reason is not None:
            return _as_it_is(step, arrays, way.pool)
        try:
            way.record(step, arrays, self._stream)
        except Exception as error:
            reason = f"{_place(error)}: {str(error) or type(error).__name__}"
        else:
            return way.replay(arrays)
        # Out here, where no error holds what the recording had taken.
        result = _as_it_is(step, arrays, way.pool)  # if it fails like this too, there is nothing to give up for
        self._give_up(reason)
        return result

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        _log.warning(
            "a training step on %s cannot be recorded as a CUDA graph and goes on launch by launch, which is slower: %s",
            self._backend,
            self.reason,
        )


class _FromDevice:
    """Memory of the device for a pool, which first hands out what it has.

    Where there is none left, a pool gives back what lies in it unused and tries again. While a step is recorded that must not be:
    what the recorded part has freed lies there, and the graph goes on using it. So then there is none left at once.
    """

    recording = False

    def __call__(self, size: int) -> Any:
        import cupy as cp

        try:
            return cp.cuda.MemoryPointer(cp.cuda.Memory(size), 0)
        except cp.cuda.runtime.CUDARuntimeError as error:
            if not self.recording or error.status != _NO_MEMORY:
                raise
            raise MemoryError(f"the device has no room for {size} bytes more beside what is recorded") from error


class _Way:
    """Steps of one kind: their memory, and their graph once it is recorded."""

    def __init__(self) -> None:
        import cupy as cp

        self._source = _FromDevice()
        self.pool = cp.cuda.MemoryPool(self._source)
        self.calls = 0
        self.graph: Any = None
        self._inputs: list[Array] = []
        self._result: Any = None

    def record(self, step: Callable[[list[Array]], Any], arrays: list[Array], stream: Any) -> None:
        """Have ``stream``, the current one, record the step, of which nothing is done yet.

        Raises:
            Whatever keeps it from being recorded. The stream no longer records then.
        """
        import cupy as cp

        with cp.cuda.using_allocator(self.pool.malloc):
            # A copy even of what lies still: it is at this address that the graph looks.
            inputs = [cp.empty_like(array) for array in arrays]
            collecting = gc.isenabled()
            gc.disable()  # what it might free belongs to other steps, and freeing it may have to wait for the device
            self._source.recording = True
            try:
                stream.begin_capture()
                try:
                    result = step(inputs)
                    _check(result)
                except BaseException:
                    _end_quietly(stream)
                    raise
                graph = stream.end_capture()
            finally:
                self._source.recording = False
                if collecting:
                    gc.enable()
        self.graph, self._inputs, self._result = graph, inputs, result

    def replay(self, arrays: list[Array]) -> Any:
        """The step on these arrays. What it gives back lies in the graph's memory, as long as no other is replayed."""
        for there, array in zip(self._inputs, arrays, strict=True):
            there[...] = array
        self.graph.launch()
        return self._result


_NO_MEMORY = 2  # cudaErrorMemoryAllocation


def _as_it_is(step: Callable[[list[Array]], Any], arrays: list[Array], pool: Any) -> Any:
    """The step, launch by launch, with memory of this pool; before there is none left, that of the pool for all else is let go."""
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


def _sorted_out(state: Any) -> tuple[dict[str, Any], dict[str, Array], tuple[Any, ...]]:
    """A state's fields by name: numbers, arrays, and all else."""
    numbers: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    fixed = []
    for item in fields(state):
        value = getattr(state, item.name)
        if _is_array(value):
            arrays[item.name] = value
        elif isinstance(value, Real) and not isinstance(value, bool):
            numbers[item.name] = value
        else:
            fixed.append((item.name, value))
    return numbers, arrays, (type(state), *((name, isinstance(n, Integral)) for name, n in numbers.items()), *fixed)


def _is_array(value: Any) -> bool:
    import cupy as cp

    return isinstance(value, cp.ndarray)


def _kind(array: Array) -> tuple[Any, ...]:
    order = tuple(sorted(range(array.ndim), key=lambda axis: -array.strides[axis]))
    return array.shape, array.dtype, order, array.device.id


def _check(result: Any) -> None:
    """Raise _UncapturableError where a replay could not give this back anew."""
    if isinstance(result, tuple | list):
        for part in result:
            _check(part)
    elif not _is_array(result):
        raise _UncapturableError(f"it gives back a {type(result).__name__}, which would be the same each time")


def _copied(result: Any) -> Any:
    """Arrays of their own, on the current stream."""
    if isinstance(result, tuple | list):
        return type(result)(map(_copied, result))
    return result.copy() if _is_array(result) else result


def _place(error: BaseException) -> str:
    """Where it happened: in which op, the innermost; else in which function of ours; else in which one of the step's."""
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
