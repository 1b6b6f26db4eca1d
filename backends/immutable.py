"""Arrays that can be written to, for libraries whose arrays cannot: ``MutableArray`` holds an array
of the library and replaces it.

The portable code writes in place (``y += x``, ``y[...] = x``, ``y[1:] = x``). Libraries with
immutable arrays, such as JAX, follow the array API standard in everything else. ``wrap`` derives a
class and a namespace from theirs. The namespace takes and returns such arrays, and calls the
library's functions on the arrays that they hold. A slice is a new array, not a view, which the code
allows for (``Backend.views_alias``).

``resolve(mylib)`` makes a backend of any namespace ``mylib`` that follows the standard. A package
makes it known by name if its entry point of the group ``portacnn.backends`` refers to
``adapter = StandardAdapter("mylib", mylib)``.
"""

from collections.abc import Callable, Iterator
from functools import update_wrapper
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from portacnn.errors import BackendError
from portacnn.runtime import Array, Backend, BackendInfo, HostArray

_CREATING = {"arange", "empty", "eye", "full", "linspace", "ones", "zeros", "from_dlpack"}
_DTYPES = tuple(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ]
)


class MutableArray:
    """An array that holds an immutable array, and replaces it where it is written to.

    ``held`` is the library's array. Classes made by ``wrap`` have the other attributes.

    Attributes:
        xp: the namespace of these arrays.
        library: the namespace of the arrays that are held.
        portacnn_backend: the name of the backend that they belong to.
    """

    __slots__ = ("__weakref__", "held")
    xp: ClassVar[Any]
    library: ClassVar[Any]
    portacnn_backend: ClassVar[str]

    # NumPy leaves operators of its own arrays with these to this class.
    __array_ufunc__ = None
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, held: Any) -> None:
        self.held = held

    shape = property(lambda self: self.held.shape)
    dtype = property(lambda self: self.held.dtype)
    ndim = property(lambda self: self.held.ndim)
    size = property(lambda self: self.held.size)
    device = property(lambda self: self.held.device)
    T = property(lambda self: type(self)(self.held.T))
    mT = property(lambda self: type(self)(self.held.mT))  # noqa: N815

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return self.xp

    def __repr__(self) -> str:
        return repr(self.held)

    # --- values on the host, and other libraries ---

    def __float__(self) -> float:
        return float(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __complex__(self) -> complex:
        return complex(self.held)

    def __bool__(self) -> bool:
        return bool(self.held)

    def __index__(self) -> int:
        return self.held.__index__()

    def __len__(self) -> int:
        return self.held.shape[0]

    def __iter__(self) -> Iterator[Array]:
        return (self[i, ...] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> HostArray:
        if copy is False:
            raise ValueError("the values of an immutable array cannot be shared, only copied")
        return np.array(self.held, dtype=dtype)

    def __dlpack__(self, **options: Any) -> Any:
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.held.__dlpack_device__()

    def to_device(self, device: Any, /, *, stream: Any = None) -> Array:
        return type(self)(self.held.to_device(device, stream=stream))

    def __copy__(self) -> Array:
        return type(self)(self.held)

    def __deepcopy__(self, memo: Any) -> Array:
        return type(self)(self.held)  # nobody can write to what both hold

    # --- indexing ---

    def __getitem__(self, key: Any) -> Array:
        return type(self)(self.xp.call(self.held.__getitem__, unwrapped(key)))

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held = self.xp.call(self.written, unwrapped(key), unwrapped(value))

    def written(self, key: Any, value: Any) -> Any:
        """Return the array to hold after ``self[key] = value``: one of the standard's ``where``.

        Raises:
            IndexError: if the key is neither a mask nor made of integers, slices and ``...``.
        """
        xp, old = self.library, self.held
        if key is Ellipsis:
            return self.as_value(value, tuple(old.shape))
        if (mask := self.as_mask(key)) is not None:
            return xp.where(mask, self.as_value(value, ()), old)
        axes = parts_of(key, tuple(old.shape))
        value = self.as_value(value, tuple(part.count for part in axes if not part.single))
        value = xp.reshape(value, tuple(part.count for part in axes))
        hit = None
        for axis, (part, length) in enumerate(zip(axes, old.shape, strict=True)):
            if part.whole(length):
                continue
            shape = tuple(length if i == axis else 1 for i in range(old.ndim))
            source = [0] * length
            inside = [False] * length
            for place, index in enumerate(part.indices()):
                source[index], inside[index] = place, True
            if part.count == 0:
                return old
            value = xp.take(value, xp.asarray(source, dtype=xp.int64, device=old.device), axis=axis)
            here = xp.reshape(xp.asarray(inside, dtype=xp.bool, device=old.device), shape)
            hit = here if hit is None else hit & here
        return value if hit is None else xp.where(hit, value, old)

    def as_mask(self, key: Any) -> Any:
        """Return a key that is a boolean array, with an axis for each of this array's; None for
        another key."""
        if not hasattr(key, "dtype") or key.dtype != self.library.bool:
            return None
        return self.library.reshape(key, (*key.shape, *(1,) * (self.ndim - key.ndim)))

    def as_value(self, value: Any, shape: tuple[int, ...]) -> Any:
        """Return a value in this array's dtype, broadcast to ``shape``."""
        xp, old = self.library, self.held
        if not hasattr(value, "dtype"):
            value = xp.asarray(value, dtype=old.dtype, device=self.device)
        elif value.dtype != old.dtype:
            value = xp.astype(value, old.dtype)
        if tuple(value.shape) == shape:
            return value
        extra = value.ndim - len(shape)  # as NumPy, which takes (1, 3) for (3,)
        if extra > 0 and set(value.shape[:extra]) == {1}:
            value = xp.reshape(value, value.shape[extra:])
        return xp.broadcast_to(value, shape)


class Part(NamedTuple):
    """What a key selects of one axis. ``single``: by an integer, so that the axis disappears."""

    start: int
    step: int
    count: int
    single: bool

    def whole(self, length: int) -> bool:
        """Whether it is the axis as it is."""
        return self.count == length and self.step == 1

    def indices(self) -> range:
        """Return the indices that it selects, in order."""
        return range(self.start, self.start + self.count * self.step, self.step)


def parts_of(key: Any, shape: tuple[int, ...]) -> list[Part]:
    """Return what a key of integers, slices and ``...`` selects of each axis. Raises IndexError."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if (count := sum(part is Ellipsis for part in keys)) > 1 or len(keys) - count > len(shape):
        raise IndexError(f"too many indices for an array of {len(shape)} axes: {key!r}")
    at = next((i for i, part in enumerate(keys) if part is Ellipsis), len(keys))
    missing = [slice(None)] * (len(shape) - len(keys) + count)
    keys = [*keys[:at], *missing, *keys[at + 1 :]]
    return [_part(key, length) for key, length in zip(keys, shape, strict=True)]


def _part(key: Any, length: int) -> Part:
    if isinstance(key, slice):
        start, stop, step = key.indices(length)
        return Part(start, step, len(range(start, stop, step)), False)
    try:
        index = key.__index__()
    except (AttributeError, TypeError):
        raise IndexError(
            f"expected a mask, or integers and slices, to write to an array; got "
            f"{type(key).__name__}"
        ) from None
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for an axis of length {length}")
    return Part(index % length, 1, 1, True)


# --- operators ------------------------------------------------------------------------------------

_ARITHMETIC = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"),
    *("and", "or", "xor", "lshift", "rshift"),
)


def _operator(name: str) -> Callable[[Any, Any], Any]:
    def operate(self: MutableArray, other: Any) -> Any:
        result = self.xp.call(getattr(self.held, name), unwrapped(other))
        return result if result is NotImplemented else type(self)(result)

    operate.__name__ = name
    return operate


def _in_place(name: str) -> Callable[[Any, Any], Any]:
    def operate(self: MutableArray, other: Any) -> Any:
        result = self.xp.call(getattr(self.held, name), unwrapped(other))
        if result is not NotImplemented:
            if result.shape != self.held.shape:
                raise ValueError(
                    f"cannot write a result of shape {tuple(result.shape)} into an array of shape "
                    f"{tuple(self.held.shape)}"
                )
            self.held = self.xp.call(self.as_value, result, tuple(result.shape))
            return self
        return NotImplemented

    return operate


def _unary(name: str) -> Callable[[Any], Any]:
    return lambda self: type(self)(self.xp.call(getattr(self.held, name)))


for _name in _ARITHMETIC:
    setattr(MutableArray, f"__{_name}__", _operator(f"__{_name}__"))
    setattr(MutableArray, f"__r{_name}__", _operator(f"__r{_name}__"))
    setattr(MutableArray, f"__i{_name}__", _in_place(f"__{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(MutableArray, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(MutableArray, f"__{_name}__", _unary(f"__{_name}__"))


# --- the namespace --------------------------------------------------------------------------------


def unwrapped(value: Any) -> Any:
    """Return what an array holds; of tuples and lists, with that of each item."""
    if isinstance(value, MutableArray):
        return value.held
    if isinstance(value, tuple | list):
        make = getattr(type(value), "_make", type(value))  # named tuples have it
        return make([unwrapped(item) for item in value])
    return value


class Namespace(ModuleType):
    """The namespace of ``MutableArray`` classes: the library's functions by name, wrapped when they
    are first used.

    Attributes:
        kind: the class of the arrays.
        library: the namespace of the arrays that they hold.
    """

    def __init__(self, library: Any, kind: type[MutableArray]) -> None:
        super().__init__(f"{kind.portacnn_backend}.mutable", library.__doc__)
        self.library, self.kind = library, kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and not name.startswith("__array"):
            raise AttributeError(name)
        found = getattr(self.library, name)
        if callable(found) and not isinstance(found, type) and name not in _DTYPES:
            found = self.wrapped(name, found)
        setattr(self, name, found)
        return found

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the library's function ``name`` for arrays of this namespace."""

        def call(*args: Any, **options: Any) -> Any:
            options = {word: unwrapped(value) for word, value in options.items()}
            return self.back(self.call(function, *map(unwrapped, args), **options))

        if name == "asarray":
            return self.asarray
        if name == "astype":
            return self.astype
        return update_wrapper(call, function)

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Return the result of a function of the library. All computation goes through here."""
        return function(*args, **options)

    def back(self, result: Any) -> Any:
        """Return a result with arrays of this namespace in it."""
        if hasattr(result, "__array_namespace__"):
            return self.kind(result)
        if isinstance(result, tuple | list):
            make = getattr(type(result), "_make", type(result))  # named tuples have it
            return make([self.back(item) for item in result])
        return result

    def asarray(
        self, obj: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None
    ) -> Array:
        """See the standard."""
        same = isinstance(obj, self.kind) and dtype in (None, obj.dtype)
        if same and device in (None, obj.device):
            return self.kind(obj.held) if copy else obj
        options = {"dtype": dtype, "device": device, "copy": copy}
        if isinstance(obj, self.kind):
            options["copy"] = None  # what is held cannot be written to
        options = {word: value for word, value in options.items() if value is not None}
        return self.kind(self.call(self.library.asarray, unwrapped(obj), **options))

    def astype(self, x: Array, dtype: Any, /, *, copy: bool = True, device: Any = None) -> Array:
        """See the standard."""
        if not copy and x.dtype == dtype and device in (None, x.device):
            return x
        options = {} if device is None else {"device": device}
        return self.kind(self.call(self.library.astype, x.held, dtype, copy=False, **options))


def wrap(library: Any, name: str) -> Namespace:
    """Return a namespace whose arrays can be written to, over one whose arrays cannot.

    Args:
        library: a namespace that follows the array API standard.
        name: of the backend.
    """
    fields = {"__slots__": (), "__module__": __name__, "portacnn_backend": name}
    kind = type(f"{name.capitalize()}Array", (MutableArray,), {**fields, "library": library})
    kind.xp = Namespace(library, kind)
    return kind.xp


# --- a backend by the standard alone --------------------------------------------------------------


class ImmutableBackend(Backend):
    """Any library with immutable arrays that follows the array API standard."""

    wraps = True

    def asarray(self, host: HostArray, dtype: str | None = None) -> Array:
        native = np.asarray(host)
        native = np.array(native, dtype=native.dtype.newbyteorder("="), order="C")
        library = self.xp.library
        if dtype is not None:
            made = library.asarray(native, device=self.device)
            return self.xp.kind(library.astype(made, self.dtype(dtype), copy=False))
        return self.xp.kind(library.asarray(native, device=self.device))

    def receive(self, array: Any) -> Array:
        return super().receive(self.taken(array))

    def taken(self, value: Any) -> Any:
        """Return an array of the library as one that can be written to, in tuples and lists too;
        other values unchanged."""
        if isinstance(value, tuple | list):
            make = getattr(type(value), "_make", type(value))
            return make([self.taken(item) for item in value])
        if isinstance(value, dict):
            return {name: self.taken(item) for name, item in value.items()}
        return self.xp.kind(value) if self.is_own(value) else value

    def is_own(self, value: Any) -> bool:
        """Return whether it is an immutable array of the library."""
        of = getattr(value, "__array_namespace__", None)
        return of is not None and not isinstance(value, MutableArray) and of() is self.xp.library

    def given_back(self, value: Any) -> Any:
        return unwrapped(value)

    def contiguous(self, array: Array) -> Array:
        return array

    def to_host(self, array: Array) -> HostArray:
        """Return the values by DLPack, else by ``__array__``."""
        held = unwrapped(array)
        try:
            return np.array(np.from_dlpack(held))
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError):
            return np.array(held)


class StandardAdapter:
    """An adapter (see ``portacnn.runtime``) of any library that follows the array API standard,
    whether its arrays are immutable or not.

    Args:
        name: of the backend: the top-level module of the library's arrays.
        library: its namespace.
    """

    KINDS = frozenset({"cpu"})

    def __init__(self, name: str, library: Any) -> None:
        self._name, self._library, self._xp = name, library, wrap(library, name)

    def _devices(self) -> dict[str, Any]:
        info = getattr(self._library, "__array_namespace_info__", None)
        found = () if info is None else info().devices()
        return {str(device): device for device in found if device is not None}

    def probe(self) -> BackendInfo:
        version = str(getattr(self._library, "__version__", "of unknown version"))
        return BackendInfo(self._name, version, tuple(self._devices()) or ("cpu",))

    def connect(self, device: str | None) -> Backend:
        found = self._devices()
        if device is not None and device not in found and (found or device != "cpu"):
            raise BackendError(
                f"expected one of {self._name}'s devices {', '.join(found) or 'cpu'}, got "
                f"{device!r}"
            )
        chosen = found.get(device) if device else None
        chosen = self._library.empty((0,)).device if chosen is None else chosen
        return ImmutableBackend(name=self._name, xp=self._xp, device=chosen)
