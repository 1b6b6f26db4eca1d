"""Functions of ``JaxArray`` compiled by XLA: single ops (``run``), and whole training steps and
forward passes (``Compiled``).

All of them run the ordinary Python code on tracers once, for each kind of arguments. What it reads
from arrays becomes an argument of one compiled function, and what it writes to them a result, which
is stored in the array after each call.

A training step finds what it reads and writes (parameters, statistics, the optimizer's state, the
data set) in a trace that computes nothing. Arrays that the step makes and keeps, such as gradients,
get the values that they were made with. In the trace that is compiled they are arguments. The
memory of arguments that are written to is reused for the results (JAX: donated), so their old
values must never be read again. An old value that anything else still refers to is copied before.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from functools import wraps
from pathlib import Path
from sys import getrefcount
from traceback import clear_frames, walk_tb
from typing import Any, NamedTuple
from weakref import ref

import jax
import jax.numpy as jnp
import numpy as np

from portacnn.backends.jax.arrays import DISPATCH, JaxArray, Trace, current_trace, tracing
from portacnn.backends.steps import code_of, sorted_out
from portacnn.errors import StateError
from portacnn.ops.dispatch import kernel_choice, precision

MOST = 16
"""The most kinds of calls for which a step or a forward pass is compiled at one time."""
_MOST_OPS = 256
_log = logging.getLogger("portacnn")
READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerBoolConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
"""The errors of code that reads a value on the host while it is traced."""


# --- structures with arrays in them ---------------------------------------------------------------


_set = JaxArray._value.__set__  # type: ignore[attr-defined]


class _Leaf(NamedTuple):
    """An array in a structure, by its number."""

    number: int


def _taken_apart(value: Any, arrays: list[JaxArray]) -> Any:
    """Return a structure with numbers for its arrays, which are appended to the list. An array that
    occurs twice has one number."""
    if isinstance(value, JaxArray):
        for number, array in enumerate(arrays):
            if array is value:
                return _Leaf(number)
        arrays.append(value)
        return _Leaf(len(arrays) - 1)
    if isinstance(value, tuple):
        items = [_taken_apart(item, arrays) for item in value]
        return (type(value), *items)
    if isinstance(value, list):
        return (list, *(_taken_apart(item, arrays) for item in value))
    if isinstance(value, dict):
        return (dict, *((name, _taken_apart(item, arrays)) for name, item in value.items()))
    if type(value) is float:
        return (float, value.hex())  # 0.0 equals -0.0, and NaN nothing
    return (None, type(value), value)  # 1 equals True


def _put_together(form: Any, arrays: list[JaxArray]) -> Any:
    """Return the structure that ``_taken_apart`` got, with these arrays."""
    if isinstance(form, _Leaf):
        return arrays[form.number]
    kind, *items = form
    if kind is None:
        return items[1]
    if kind is float:
        return float.fromhex(items[0])
    if kind is dict:
        return {name: _put_together(item, arrays) for name, item in items}
    items = [_put_together(item, arrays) for item in items]
    return getattr(kind, "_make", kind)(items)


def _like(array: JaxArray) -> tuple[Any, ...]:
    value = array._value
    return value.shape, value.dtype, value.weak_type


# --- single ops -----------------------------------------------------------------------------------


class _CompiledOp:
    """A function of the arrays in its arguments, compiled for one kind of them."""

    def __init__(self, function: Callable[..., Any], form: Any, device: Any) -> None:
        self._function, self._form, self._device = function, form, device
        self._compiled = _jitted(self)
        self._result: Any = None
        # of each array in the result: its number among the new ones, or -1 - that of an argument
        self._order: list[int] = []
        self._written: list[int] = []

    def _pure(self, values: list[Any]) -> Any:
        trace = Trace(self._device)
        given = [JaxArray(value) for value in values]
        for array, value in zip(given, values, strict=True):
            trace.set(array, value)
        with tracing(trace):
            args, options = _put_together(self._form, given)
            found: list[JaxArray] = []
            self._result = _taken_apart(self._function(*args, **options), found)
            # a result may be an argument, as in what is saved for the backward pass
            place = {id(array): -1 - number for number, array in enumerate(given)}
            fresh: list[Any] = []
            for array in found:
                if id(array) not in place:
                    place[id(array)] = len(fresh)
                    fresh.append(array.held)
            self._order = [place[id(array)] for array in found]
            self._written = [n for n, array in enumerate(given) if id(array) in trace.writes]
            return fresh, [given[n].held for n in self._written]

    def __call__(self, given: list[JaxArray]) -> Any:
        with DISPATCH:
            fresh, written = self._compiled([array._value for array in given])
            for number, value in zip(self._written, written, strict=True):
                given[number]._value = value
        made = [JaxArray(value) for value in fresh]
        return _put_together(
            self._result, [made[n] if n >= 0 else given[-1 - n] for n in self._order]
        )


_ops: OrderedDict[Any, _CompiledOp] = OrderedDict()
_eager: set[Any] = set()


def run(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    """Return ``function(*args, **options)``, compiled unless it reads values on the host. Inside a
    trace it is part of the trace."""
    if current_trace() is not None or function in _eager:
        return function(*args, **options)
    given: list[JaxArray] = []
    form = _taken_apart((args, options), given)
    if not given:
        return function(*args, **options)
    key = (function, form, tuple(map(_like, given)), given[0].device, kernel_choice(), precision())
    try:
        found = _ops.get(key)
    except TypeError:  # an argument that cannot be a key
        return function(*args, **options)
    if found is None:
        found = _ops[key] = _CompiledOp(function, form, given[0].device)
        if len(_ops) > _MOST_OPS:
            _ops.pop(next(iter(_ops)))
    try:
        return JaxArray.xp.call(found, given)
    except READS:
        _eager.add(function)
        _ops.pop(key, None)  # another thread may have done the same
        return function(*args, **options)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel's function, compiled as ``run`` does."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        return run(function, *args, **options)

    return call


# --- whole steps ----------------------------------------------------------------------------------


class Compiled:
    """``function(*arrays, state)``, compiled for each kind of arguments. ``state`` is a dataclass,
    or one more array.

    Its numbers become 0-dimensional arrays, int64 or float64. A kind is defined by the shapes and
    dtypes of the arrays, by what else the state has, and by the kernel set and precision in use.

    Attributes:
        kinds: the number of compiled kinds.
        reason: why compiling was given up, or None.
    """

    def __init__(self, function: Callable[..., Any], backend: Any, what: str) -> None:
        self._function, self._backend, self._what = function, backend, what
        self._ways: OrderedDict[Any, _Way] = OrderedDict()
        self._made = 0
        self.reason: str | None = None

    @property
    def kinds(self) -> int:
        return len(self._ways)

    def __call__(self, *arguments: Any) -> Any:
        if self.reason is not None or current_trace() is not None:
            return self._function(*arguments)
        *arrays, state = arguments
        numbers, held, fixed = _sorted_out(state)
        arrays += held.values()
        key = (fixed, tuple(map(_like, arrays)), kernel_choice(), precision())
        way = self._ways.get(key)
        if way is None:
            step = self._function

            def function(arrays: list[JaxArray], numbers: dict[str, JaxArray]) -> Any:
                count = len(arrays) - len(held)
                if not is_dataclass(state):
                    return step(*arrays)
                own = dict(zip(held, arrays[count:], strict=True))
                return step(*arrays[:count], replace(state, **numbers, **own))

            return self._first(key, function, arrays, numbers, arguments)
        if len(self._ways) > 1:
            self._ways.move_to_end(key)
        return JaxArray.xp.call(way.run, arrays, numbers)

    def _first(
        self,
        key: Any,
        function: Callable[..., Any],
        arrays: list[JaxArray],
        numbers: dict[str, Any],
        arguments: tuple[Any, ...],
    ) -> Any:
        """Compile for a new kind of arguments, and call."""
        begun = time.perf_counter()
        way = _Way(function, self._backend.device, self._what)
        try:
            JaxArray.xp.call(way.prepare, arrays, numbers)
        except READS as error:
            self._give_up(error)
            return self._function(*arguments)
        result = JaxArray.xp.call(way.run, arrays, numbers)
        self._made += 1
        shapes = ", ".join("x".join(map(str, array.shape)) for array in arrays if array.ndim)
        seconds = time.perf_counter() - begun
        _log.info(
            "%s: compiled %s for arrays of %s in %.1f s", self._backend, self._what, shapes, seconds
        )
        if self._made == MOST + 1:
            _log.warning(
                "%s has compiled %s for %d shapes of a batch; each new one takes about %.1f s. Pad "
                "or resize the images to fewer sizes",
                self._backend,
                self._what,
                self._made,
                seconds,
            )
        while len(self._ways) >= MOST:
            self._ways.popitem(last=False)
        self._ways[key] = way
        return result

    def _give_up(self, error: Exception) -> None:
        self.reason = f"{_reader(error)}: {str(error).strip().partition(chr(10))[0]}"
        self._ways.clear()
        _log.warning(
            "%s cannot be compiled on %s, because it reads a value on the host; it runs op by op, "
            "which is slower: %s",
            self._what,
            self._backend,
            self.reason,
        )


def _reader(error: BaseException) -> str:
    """Return which function, outside this backend and JAX, raised the error of a traced read."""
    ours = ("jax.", "portacnn.backends.")
    found = "the step"
    for frame, line in walk_tb(error.__traceback__):
        if not frame.f_globals.get("__name__", "").startswith(ours):
            code = frame.f_code
            found = f"{code.co_qualname} ({Path(code.co_filename).name}, line {line})"
    return found


class _Way:
    """A function compiled for one kind of arguments."""

    def __init__(self, function: Callable[..., Any], device: Any, what: str) -> None:
        self._function, self._device, self._what = function, device, what

    def prepare(self, arrays: list[JaxArray], numbers: dict[str, Any]) -> None:
        """Find out what the function reads and writes. The first call compiles it."""
        trace, made = self._discovered(arrays, numbers)
        if made:
            # Again, now that these exist: the order of arguments, and with it rounding, is then
            # that of a training that is resumed.
            trace, made = self._discovered(arrays, numbers)
        self._replaced = [ref(array) for array in made]  # each step makes them anew
        self._donated = list(trace.writes.values())
        self._read = [array for key, array in trace.reads.items() if key not in trace.writes]
        self._compiled = _jitted(self, donate_argnums=(0,))

    def _discovered(
        self, arrays: list[JaxArray], numbers: dict[str, Any]
    ) -> tuple[Trace, list[JaxArray]]:
        """Trace the function without computing anything. Return the trace, and the arrays that it
        has made and kept, with the values that they were made with."""
        values, words = [array._value for array in arrays], _words(numbers)
        trace = Trace(self._device)
        kept: list[JaxArray] = []
        raised: list[BaseException] = []

        def discover(values: list[Any], words: dict[str, Any]) -> list[Any]:
            with tracing(trace):
                try:
                    self._traced(values, words)
                except BaseException as error:  # raised again once all arrays have values
                    clear_frames(error.__traceback__)
                    raised.append(error)
                found = trace.survivors()
                kept.extend(array for array, _ in found)
                return [first for _, first in found]

        try:
            jaxpr = jax.make_jaxpr(discover)(values, words)
            if kept:
                firsts = _evaluated(jaxpr, jax.tree.leaves((values, words)))
                for array, first in zip(kept, firsts, strict=True):
                    array.settle(jax.device_put(first, self._device))
        except BaseException:  # out of memory, or interrupted
            trace.give_up()
            raise
        if raised:
            raise raised[0]
        return trace, kept

    def _traced(self, values: list[Any], words: dict[str, Any]) -> Any:
        arrays = [JaxArray(value) for value in values]
        return self._function(arrays, {name: JaxArray(value) for name, value in words.items()})

    def _pure(
        self, donated: list[Any], read: list[Any], values: list[Any], words: dict[str, Any]
    ) -> Any:
        trace = Trace(self._device)
        for array, value in zip(self._donated, donated, strict=True):
            trace.set(array, value)
        for array, value in zip(self._read, read, strict=True):
            trace.set(array, value)
        try:
            with tracing(trace):
                return self._results(trace, values, words)
        except BaseException:
            trace.give_up()
            raise

    def _results(self, trace: Trace, values: list[Any], words: dict[str, Any]) -> Any:
        """Run the function in the trace, and return the tracers that ``_pure`` does."""
        found: list[JaxArray] = []
        self._form = _taken_apart(self._traced(values, words), found)
        if any(id(weak()) in trace.reads for weak in self._replaced):
            raise StateError(
                f"{self._what} on JAX replaces an array that the next one reads, which cannot be "
                "compiled; write to the array instead (array[...] = new), or make the Trainer with "
                "compile_step=False"
            )
        results = [array.held for array in found]
        self._written = [
            array
            for key, array in trace.writes.items()
            if not any(array is one for one in self._donated)
        ]
        del found
        seen = trace.survivors()
        self._observed = [ref(array) for array, _ in seen]
        observed = [array.held for array, _ in seen]
        return (
            [array.held for array in self._donated],
            [array.held for array in self._written],
            observed,
            results,
        )

    def run(self, arrays: list[JaxArray], numbers: dict[str, Any]) -> Any:
        """Run the compiled function, and store what it has written."""
        with DISPATCH:
            results = self._run(arrays, numbers)
        return _put_together(self._form, [JaxArray(value) for value in results])

    def _run(self, arrays: list[JaxArray], numbers: dict[str, Any]) -> list[Any]:
        out: list[Any] = []
        donated = [array._value for array in self._donated]
        for number in range(len(donated)):
            # Referred to by its array, the list, and the argument of getrefcount.
            if getrefcount(donated[number]) > 3:
                donated[number] = jnp.copy(donated[number])
        read = [array._value for array in self._read]
        given = [array._value for array in arrays]
        words = _words(numbers)
        try:
            # Not a call and an assignment, between which a signal's exception could come: the old
            # values are gone by then.
            out.extend(map(self._compiled, (donated,), (read,), (given,), (words,)))
        finally:
            if out:
                updated, written, observed, _ = out[0]
                deque(map(_set, (*self._donated, *self._written), (*updated, *written)), maxlen=0)
                for weak, value in zip(self._observed, observed, strict=True):
                    if (array := weak()) is not None:
                        array.settle(value)
        return out[0][3]  # type: ignore[no-any-return]


def _jitted(owner: Any, **options: Any) -> Callable[..., Any]:
    """Return ``owner._pure``, compiled. The function does not keep its owner, and the arrays that
    this refers to, alive."""
    weak = ref(owner)
    return jax.jit(lambda *args: weak()._pure(*args), **options)


def _evaluated(jaxpr: Any, leaves: list[Any]) -> list[Any]:
    """Return the results of a traced function, computing only what they depend on."""
    from jax.extend.core import jaxpr_as_fun
    from jax.interpreters import partial_eval

    small, _ = partial_eval.dce_jaxpr(
        jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True
    )
    closed = jaxpr.replace(jaxpr=small)
    return jax.jit(jaxpr_as_fun(closed))(*leaves)


def _words(numbers: dict[str, Any]) -> dict[str, Any]:
    """Return numbers as int64 and float64."""
    return {
        name: np.int64(value) if code_of(type(value)) == "q" else np.float64(value)
        for name, value in numbers.items()
    }


def _sorted_out(state: Any) -> tuple[dict[str, Any], dict[str, JaxArray], tuple[Any, ...]]:
    """Split a state into numbers, arrays, and everything else. An array is its only array."""
    if isinstance(state, JaxArray):
        return {}, {"": state}, (JaxArray,)
    return sorted_out(state, JaxArray)
