"""JAX arrays that can be written to, their namespace, and ``Trace``: what a traced function reads
and writes.

``jax.jit`` compiles pure functions. While a function is traced, reading a ``JaxArray`` from outside
returns the tracer that represents what it holds, and a write is stored in the ``Trace``. The array
itself does not change. An error therefore leaves all arrays as they were, and other threads see no
tracers.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import RLock, local
from typing import Any, NoReturn
from weakref import ref

import jax
import jax.numpy as jnp
import numpy as np

from portacnn.backends.immutable import MutableArray, Namespace, Part, parts_of, unwrapped
from portacnn.ops.dispatch import precision
from portacnn.runtime import Array, HostArray

PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}
"""JAX's names of precisions of ``ops.use_precision``."""
_DTYPES = (
    *("bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
)
_CREATING = ("zeros", "ones", "empty", "full", "zeros_like", "ones_like", "empty_like", "full_like")
_SMALL = 1 << 20
DISPATCH = RLock()
"""Held while a thread takes what an array holds. A thread that runs a compiled step holds it until
XLA has all arguments and their arrays have new values: what the step donates is gone by then."""


class Trace:
    """What a function that is being traced in this thread reads and writes.

    Attributes:
        device: the device that it is compiled for.
        values: what the arrays from outside hold in the trace, by the array's id.
        reads, writes: the arrays from outside that were read or written, by id.
    """

    def __init__(self, device: Any) -> None:
        self.device = device
        self.values: dict[int, Any] = {}
        self.reads: dict[int, JaxArray] = {}
        self.writes: dict[int, JaxArray] = {}
        self._made: list[tuple[ref[JaxArray], Any]] = []

    def set(self, array: "JaxArray", value: Any) -> None:
        """Let a tracer represent what an array from outside holds."""
        self.values[id(array)] = value
        self.reads[id(array)] = array

    def read(self, array: "JaxArray") -> Any:
        if id(array) not in self.values:
            self.set(array, array._value)  # a constant of the trace
        return self.values[id(array)]

    def write(self, array: "JaxArray", value: Any) -> None:
        self.values[id(array)] = value
        self.writes[id(array)] = array

    def made(self, array: "JaxArray", value: Any) -> None:
        """Note an array that was made in the trace."""
        self._made.append((ref(array), value))

    def survivors(self) -> list[tuple["JaxArray", Any]]:
        """Return the arrays made in the trace that are still in use, each with its first value.
        Those that only held constants are left out."""
        gc.collect()
        traced = jax.core.Tracer
        return [
            (array, first)
            for weak, first in self._made
            if (array := weak()) is not None
            and (isinstance(first, traced) or isinstance(array._value, traced))
        ]

    def give_up(self) -> None:
        """Let no array keep a tracer after a trace that was interrupted. Their first values, which
        are unknown, are zeros of gradients and of the optimizer's state."""
        for array, first in self.survivors():
            known = not isinstance(first, jax.core.Tracer)
            zeros = np.zeros(first.shape, first.dtype)
            array.settle(first if known else _sent(zeros, self.device))


class _Current(local):
    trace: Trace | None = None


_current = _Current()


def current_trace() -> Trace | None:
    """Return the trace in this thread, or None."""
    return _current.trace


@contextmanager
def tracing(trace: Trace) -> Iterator[None]:
    """Make ``trace`` the one in this thread inside a ``with`` block."""
    before, _current.trace = _current.trace, trace
    try:
        yield
    finally:
        _current.trace = before


def _sent(host: HostArray, device: Any) -> jax.Array:
    """Return an array of the host, which nobody else has, on a device. In a trace it is a constant,
    so it may be kept."""
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        trace = _current.trace
        return jax.device_put(host, trace.device if device is None and trace else device)


class JaxNamespace(Namespace):
    """``jax.numpy`` for ``JaxArray``: with 64-bit types, whatever the caller's setting of JAX, and
    exact products (``ops.use_precision``)."""

    def __init__(self) -> None:
        super().__init__(jnp, JaxArray)
        for name in _DTYPES:
            # jax.numpy's own are classes, which equal a dtype but have another hash
            setattr(self, name.rstrip("_"), np.dtype(getattr(jnp, name)))

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with (
            jax.enable_x64(True),
            jax.default_matmul_precision(PRECISIONS.get(precision(), "highest")),
        ):
            if _current.trace is not None:
                options.pop("device", None)
            return function(*args, **options)

    def back(self, result: Any) -> Any:
        return JaxArray(result) if isinstance(result, jax.Array) else super().back(result)

    def asarray(
        self, obj: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None
    ) -> Array:
        """See the standard. Values from the host are constants of a trace, and may be kept."""
        if isinstance(obj, jax.Array | JaxArray):
            return super().asarray(obj, dtype=dtype, device=device, copy=copy)
        return JaxArray(_sent(np.array(unwrapped(obj), dtype=dtype), device))

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        wrapped = super().wrapped(name, function)
        if name not in _CREATING:
            return wrapped
        by_numpy = getattr(np, name)

        @wraps(wrapped)
        def create(*args: Any, device: Any = None, **options: Any) -> Array:
            """Create a small array on the host, where nothing has to be compiled for its shape."""
            shape = args[0]
            if name.endswith("_like"):
                one, shape = args[0], args[0].shape
                device, options["dtype"] = device or one.device, options.get("dtype") or one.dtype
                args = (np.broadcast_to(np.zeros((), bool), shape), *args[1:])
            if _current.trace is not None or np.prod(shape) > _SMALL:
                return wrapped(*args, device=device, **options)
            return JaxArray(_sent(by_numpy(*args, **options), device))

        return create

    def from_dlpack(self, x: Any, /, **options: Any) -> Array:
        """See the standard."""
        return JaxArray(self.call(jnp.from_dlpack, x, **options))


class JaxArray(MutableArray):
    """An array that holds a ``jax.Array``."""

    __slots__ = ("_made_in", "_value")
    library = jnp
    portacnn_backend = "jax"

    def __init__(self, held: Any) -> None:
        self._value = held
        self._made_in = trace = _current.trace
        if trace is not None:
            trace.made(self, held)

    @property
    def held(self) -> Any:  # type: ignore[override]
        trace = _current.trace
        if trace is None or self._made_in is trace:
            with DISPATCH:
                return self._value
        return trace.read(self)

    @held.setter
    def held(self, value: Any) -> None:
        trace = _current.trace
        if trace is None or self._made_in is trace:
            self._value = value
        else:
            trace.write(self, value)

    def settle(self, value: Any) -> None:
        """Set the value after the trace in which the array was made or written to."""
        self._value, self._made_in = value, None

    @property
    def device(self) -> Any:
        held, trace = self._value, _current.trace
        return trace.device if trace and isinstance(held, jax.core.Tracer) else held.device

    # Copies, because a compiled step reuses the memory of the arrays that it updates.

    def __jax_array__(self) -> jax.Array:
        held = self.held
        return held if isinstance(held, jax.core.Tracer) else self.xp.call(jnp.copy, held)

    def __dlpack__(self, **options: Any) -> Any:
        return self.__jax_array__().__dlpack__(**options)

    def __setstate__(self, state: Any) -> NoReturn:
        raise TypeError("arrays of the JAX backend cannot be unpickled; pickle the model")

    def __truediv__(self, other: Any) -> Array:
        """Return the quotients, each rounded once. XLA would multiply by the inverse of a divisor
        that several elements share, which rounds twice; here each has its own."""
        if isinstance(other, JaxArray) and 0 < other.size < self.size:
            return JaxArray(self.xp.call(_divided, self.held, other.held))
        return super().__truediv__(other)

    def as_value(self, value: Any, shape: tuple[int, ...]) -> Any:
        if not hasattr(value, "dtype"):
            value = np.asarray(value, dtype=self.held.dtype)  # a constant in a trace
        return super().as_value(value, shape)

    def written(self, key: Any, value: Any) -> Any:
        old = self.held
        if key is Ellipsis:
            return self.as_value(value, tuple(old.shape))
        if (mask := self.as_mask(key)) is not None:
            return jnp.where(mask, self.as_value(value, ()), old)
        parts = parts_of(key, tuple(old.shape))
        value = self.as_value(value, tuple(part.count for part in parts if not part.single))
        return _placed(old, jnp.reshape(value, [part.count for part in parts]), parts)


JaxArray.xp = JaxNamespace()


def _divided(x: Any, by: Any) -> Any:
    # The sum is the divisor, also if x is infinite; XLA does not see that.
    return x / (by + 0 * jnp.minimum(jnp.abs(x), 1)) if x.dtype.kind == "f" else x / by


def _placed(old: Any, value: Any, parts: list[Part]) -> Any:
    """Return ``old`` with values at what ``parts`` select of each axis. Not by a scatter, which on
    the CPU is a loop: XLA fuses a padding and a ``where`` with what follows."""
    if 0 in value.shape:
        return old
    if all(part.whole(length) for part, length in zip(parts, old.shape, strict=True)):
        return value
    backwards = [axis for axis, part in enumerate(parts) if part.step < 0]
    if backwards:
        value = jnp.flip(value, backwards)
        parts = [
            part._replace(start=part.indices()[-1], step=-part.step) if part.step < 0 else part
            for part in parts
        ]
    if all(part.step == 1 for part in parts):
        return jax.lax.dynamic_update_slice(old, value, [part.start for part in parts])
    padding = [
        (part.start, length - part.indices()[-1] - 1, part.step - 1)
        for part, length in zip(parts, old.shape, strict=True)
    ]
    padded = jax.lax.pad(value, np.zeros((), value.dtype), padding)
    hit = np.ones((1,) * old.ndim, dtype=bool)
    for axis, (part, length) in enumerate(zip(parts, old.shape, strict=True)):
        here = np.zeros(length, dtype=bool)
        here[part.indices()] = True
        hit = hit & here.reshape([length if i == axis else 1 for i in range(old.ndim)])
    return jnp.where(hit, padded, old)
