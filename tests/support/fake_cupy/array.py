"""``cupy.ndarray`` of the stand-in, and how NumPy's functions become CuPy's: which arguments are
refused, where results lie.

An array is no NumPy array and becomes none unasked: ``numpy.asarray(a)`` raises as with CuPy, and
so does a NumPy array among the arguments of a function. What reads a number back (``float(a)``,
``a.item()``, ``if a:``) works, as there, and is noted as a transfer.
"""

import operator
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from support.fake_cupy import machine, operators
from support.fake_cupy.machine import (
    Block,
    CUDARuntimeError,
    Device,
    Late,
    Memory,
    MemoryPointer,
    Work,
    log,
    submit,
)

JOINS = {"array", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "column_stack"}
JOINED_AT_ONCE = 8
"""How many arrays CuPy joins one by one; of more, which are not large, it sends a table of their
addresses."""
LARGE_PART = 2 << 20  # bytes
SENT = {
    **dict.fromkeys(
        ("take", "repeat", "searchsorted", "isin", "digitize", "append", "percentile", "quantile"),
        1,
    ),
    **dict.fromkeys(("compress", "extract", "choose"), 0),
}
"""Functions that send a list, and at which place among their arguments they take one."""
CUBLAS = {
    "matmul",
    "dot",
    "vdot",
    "inner",
    "outer",
    "tensordot",
    "einsum",
    "vecdot",
    "kron",
    "convolve",
    "correlate",
}
READS_BACK = {
    "nonzero",
    "flatnonzero",
    "argwhere",
    "unique",
    "extract",
    "compress",
    "array_equal",
    "allclose",
}


class ndarray:  # noqa: N801
    """Memory of a device, and a NumPy array over it, which nobody outside of this package gets to
    see."""

    __module__ = "cupy"
    __slots__ = ("__weakref__", "_a", "_memory")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self, shape: Any, dtype: Any = float, memptr: MemoryPointer | None = None, order: str = "C"
    ) -> None:
        like = np.empty(shape, dtype, order) if memptr is None else np.empty(shape, dtype)  # type: ignore[call-overload]
        made = _allocate(like, memptr)
        self._a, self._memory = made._a, made._memory

    # --- what it is ---

    shape = property(lambda self: self._a.shape)
    dtype = property(lambda self: self._a.dtype)
    ndim = property(lambda self: self._a.ndim)
    size = property(lambda self: self._a.size)
    itemsize = property(lambda self: self._a.itemsize)
    nbytes = property(lambda self: self._a.nbytes)
    strides = property(lambda self: self._a.strides)
    device = property(lambda self: Device(self._memory.device_id))

    @property
    def data(self) -> MemoryPointer:
        return MemoryPointer(self._memory, self._a.ctypes.data - self._memory.ptr)

    @property
    def flags(self) -> SimpleNamespace:
        flags = self._a.flags
        return SimpleNamespace(
            c_contiguous=flags.c_contiguous, f_contiguous=flags.f_contiguous, forc=flags.forc
        )

    T = property(lambda self: view(self._a.T, self))
    mT = property(lambda self: view(self._a.mT, self))  # noqa: N815
    real = property(lambda self: view(self._a.real, self))

    def __len__(self) -> int:
        return len(self._a)

    def __iter__(self) -> Iterator["ndarray"]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    # --- to the host and from it ---

    def get(
        self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True
    ) -> np.ndarray:
        with self.device:
            stream = machine.get_current_stream() if stream is None else stream
            stream._refuse_in_capture()
            stream._touch([self._memory.block], [], "get")
            stream._finish()
        log.note("d2h", "", self.nbytes)
        if out is not None:
            out[...] = self._a
            return out
        return self._a.copy(order)  # type: ignore[arg-type]

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        if not isinstance(arr, np.ndarray) or arr.shape != self.shape or arr.dtype != self.dtype:
            raise TypeError(
                f"only a NumPy array of {self.dtype} {self.shape} can be set, got "
                f"{type(arr).__name__}"
            )
        if not self._a.flags.forc:
            raise RuntimeError("Cannot set to non-contiguous array")
        with self.device:
            stream = machine.get_current_stream() if stream is None else stream
            stream._refuse_in_capture()
            block, into = self._memory.block, self._a
            stream._touch([], [block], "set")
            log.note("h2d", "pinned" if machine.is_pinned(arr) else "", self.nbytes)
            if not machine.is_pinned(arr):
                into[...] = arr
                return
            late = Late(lambda: into.__setitem__(..., arr))
            block.late.append(late)
            stream._late.append(late)

    def item(self, *index: int) -> Any:
        return self.get().item(*index)

    def tolist(self) -> Any:
        return self.get().tolist()

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct "
            "a NumPy array "
            "explicitly."
        )

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        raise BufferError("the stand-in for CuPy hands out no memory")

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __complex__(self) -> complex:
        return complex(self.get())

    def __index__(self) -> int:
        return operator.index(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, form: str) -> str:
        return format(self.get(), form)

    # --- parts ---

    def __getitem__(self, key: Any) -> "ndarray":
        arrays: list[ndarray] = []
        return call("getitem", lambda a, k: a[k], (self, _index(key, arrays)), fancy=bool(arrays))

    def __setitem__(self, key: Any, value: Any) -> None:
        arrays: list[ndarray] = []
        place = _index(key, arrays)
        number = isinstance(value, int | float | complex | bool | np.generic) or np.ndim(value) == 0
        if not isinstance(value, ndarray) and (isinstance(value, np.ndarray) or not number):
            raise TypeError(f"Unsupported type {type(value)}")
        into, values = self._a, value._a if isinstance(value, ndarray) else value
        plain = tuple(k._a if isinstance(k, ndarray) else k for k in place)
        if any(array.dtype == bool for array in arrays):  # CuPy counts where a mask is true
            machine.get_current_stream()._refuse_in_capture()
            log.note("sync", "setitem")
        if isinstance(value, ndarray):
            arrays.append(value)
        submit(
            Work(
                "setitem",
                lambda: into.__setitem__(plain, values),
                _blocks(arrays),
                [self._memory.block],
            )
        )

    # --- methods ---

    def astype(
        self,
        dtype: Any,
        order: str = "K",
        casting: Any = None,
        subok: Any = None,
        copy: bool = True,
    ) -> Any:
        if not copy and self.dtype == dtype:
            return self
        return call("astype", lambda a: a.astype(dtype, order), (self,))

    def view(self, dtype: Any) -> "ndarray":
        return view(self._a.view(dtype), self)

    def copy(self, order: str = "C") -> "ndarray":
        return call("copy", lambda a: a.copy(order), (self,))

    def __copy__(self) -> "ndarray":
        return self.__deepcopy__(None)

    def __deepcopy__(self, memo: Any) -> "ndarray":
        with self.device:
            return self.copy("K")

    def fill(self, value: Any) -> None:
        into = self._a
        number = value._a if isinstance(value, ndarray) else value
        reads = _blocks([value]) if isinstance(value, ndarray) else []
        submit(Work("fill", lambda: into.fill(number), reads, [self._memory.block]))

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method != "__call__":
            return NotImplemented
        out = kwargs.pop("out", (None,))[0]
        return call(
            ufunc.__name__, ufunc, args, {**kwargs, **({} if out is None else {"out": out})}
        )

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return call(function.__name__, function, args, kwargs)


def _allocate(like: np.ndarray, pointer: MemoryPointer | None = None) -> ndarray:
    """Room for an array like this one, its axes in the same order in memory."""
    if pointer is None:
        pointer = machine.get_allocator()(like.nbytes)
    memory = pointer.mem
    begin = pointer.ptr - memory.ptr
    flat = memory.block.memory[begin : begin + like.nbytes]
    flat = flat.view(like.dtype) if like.nbytes else np.empty(0, like.dtype)
    axes = sorted(range(like.ndim), key=lambda axis: -abs(like.strides[axis]))
    array = flat.reshape([like.shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return _made(array, memory)


def _made(array: np.ndarray, memory: Memory) -> ndarray:
    self = ndarray.__new__(ndarray)
    self._a, self._memory = array, memory
    return self


def view(array: np.ndarray, of: ndarray) -> ndarray:
    return of if array is of._a else _made(array, of._memory)


def _blocks(arrays: list[ndarray]) -> list[Block]:
    return list({id(array._memory.block): array._memory.block for array in arrays}.values())


def _index(key: Any, arrays: list[ndarray]) -> tuple[Any, ...]:
    """An index as a tuple; the arrays in it are noted in ``arrays``."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if isinstance(part, np.ndarray | list):
            raise TypeError(f"an index of {type(part)} would be sent to the device; send it before")
        if isinstance(part, ndarray):
            arrays.append(part)
    return tuple(parts)


def _host(value: Any, arrays: list[ndarray]) -> Any:
    """The argument as NumPy takes it; the arrays in it are noted in ``arrays``."""
    if isinstance(value, ndarray):
        arrays.append(value)
        return value._a
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    if isinstance(value, tuple | list):
        return type(value)(_host(part, arrays) for part in value)
    return value


def _lies_in(array: np.ndarray, arrays: list[ndarray]) -> ndarray | None:
    """Which of the arrays this one is a view of."""
    root: Any = array
    while isinstance(getattr(root, "base", None), np.ndarray):
        root = root.base
    for other in arrays:
        whole: Any = other._memory.block.memory
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        if root is whole:
            return other
    return None


def call(
    name: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    fancy: bool = False,
    pageable: bool = False,
) -> Any:
    """A function of NumPy's on device arrays: its views stay views, all else is a launch that fills
    new memory, or ``out``."""
    arrays: list[ndarray] = []
    plain, named = (
        _host(args, arrays),
        {key: _host(value, arrays) for key, value in (kwargs or {}).items()},
    )
    out = (kwargs or {}).get("out")
    for _ in range(_tables(name, args)):
        machine.note_sent(name)
    recording = machine.get_current_stream()._recording
    if recording is not None and name in CUBLAS:
        raise NotImplementedError(
            f"{name}: calling cuBLAS API during stream capture is currently unsupported."
        )
    if name in READS_BACK or (fancy and any(array.dtype == bool for array in arrays[1:])):
        machine.get_current_stream()._refuse_in_capture()
        log.note("sync", name)
    if isinstance(out, ndarray):
        into = out._a
        submit(Work(name, lambda: function(*plain, **named), _blocks(arrays), [out._memory.block]))
        assert into is out._a
        return out
    for array in arrays:  # what is late is there before it is looked at
        if recording is None:
            for late in array._memory.block.late:
                late.do()
    with np.errstate(all="ignore"):
        results = function(*plain, **named)

    def again() -> Any:
        return function(*plain, **named)

    if isinstance(results, tuple | list) and not isinstance(results, np.ndarray):
        parts = [
            _placed(name, result, arrays, lambda i=i: again()[i], recording)
            for i, result in enumerate(results)
        ]
        return type(results)(*parts) if hasattr(results, "_fields") else type(results)(parts)
    return _placed(name, results, arrays, again, recording)


def _tables(name: str, args: tuple[Any, ...]) -> int:
    """How many arrays CuPy makes on the host and sends, unasked, for a call with these
    arguments."""
    if name in JOINS and isinstance(args[0], tuple | list):
        parts: list[ndarray] = []
        _host(args[0], parts)
        few = len(parts) <= JOINED_AT_ONCE or len({part.dtype for part in parts}) > 1
        if few or sum(part.nbytes for part in parts) >= LARGE_PART * len(parts):
            return 0
        packed = all(part.flags.c_contiguous and part.shape == parts[0].shape for part in parts)
        return 1 if packed else 3  # addresses; and where each begins, and its strides
    place = SENT.get(name)
    return int(
        place is not None and len(args) > place and isinstance(args[place], tuple | list | range)
    )


def _placed(
    name: str, result: Any, arrays: list[ndarray], again: Callable[[], Any], recording: Any
) -> Any:
    if not isinstance(result, np.ndarray | np.generic):
        return result
    value = np.asarray(result)
    source = _lies_in(value, arrays)
    if source is not None:
        return next((array for array in arrays if array._a is result), None) or _made(
            value, source._memory
        )
    made = _allocate(value)
    into = made._a
    blocks = _blocks(arrays)
    if recording is not None:
        submit(Work(name, lambda: into.__setitem__(..., again()), blocks, [made._memory.block]))
    else:
        submit(Work(name, lambda: into.__setitem__(..., value), blocks, [made._memory.block]))
    return made


operators.install(ndarray, call)


def array(
    obj: Any,
    dtype: Any = None,
    copy: bool | None = True,
    order: str = "K",
    subok: bool = False,
    ndmin: int = 0,
    blocking: bool = False,
) -> ndarray:
    """``cupy.array``: of a device array, of lists of some, or of what comes from the host."""
    found: list[ndarray] = []
    if isinstance(obj, tuple | list):
        _host(obj, found)
    if found:
        return call("stack", lambda parts: np.array(parts, dtype), (obj,))
    if isinstance(obj, ndarray):
        if not copy and (dtype is None or obj.dtype == dtype):
            return obj
        return call("array", lambda a: np.array(a, dtype, order=order), (obj,))  # type: ignore[call-overload]
    host = np.array(obj, dtype, order=order, ndmin=ndmin)  # type: ignore[call-overload]
    # no other order survives the way
    host = host if host.flags.forc else np.ascontiguousarray(host)
    if host.dtype == object:
        raise ValueError("Unsupported dtype object")
    made = _allocate(host)
    if host.ndim:
        made.set(host)
    else:
        made.fill(host[()])  # it travels as the argument of a launch
    return made


def asarray(
    a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False
) -> ndarray:
    if copy is False and not isinstance(a, ndarray):
        raise ValueError("Unable to avoid copy while creating an array as requested.")
    return array(a, dtype, bool(copy), order or "K")


def ascontiguousarray(a: Any, dtype: Any = None) -> ndarray:
    a = asarray(a, dtype)
    a = a if a._a.flags.c_contiguous else a.copy()
    return a if a.ndim else a.reshape((1,))


def empty(shape: Any, dtype: Any = float, order: str = "C") -> ndarray:
    return _allocate(np.empty(shape, dtype, order))  # type: ignore[call-overload]


def empty_like(
    prototype: ndarray, dtype: Any = None, order: str = "K", subok: Any = None, shape: Any = None
) -> ndarray:
    return _allocate(np.empty_like(prototype._a, dtype, order, shape=shape))  # type: ignore[call-overload]


def asnumpy(
    a: Any, stream: Any = None, order: str = "C", out: Any = None, *, blocking: bool = True
) -> np.ndarray:
    return a.get(stream, order, out, blocking) if isinstance(a, ndarray) else np.asarray(a)


__all__ = ["CUDARuntimeError", "array", "asarray", "asnumpy", "call", "ndarray", "view"]
