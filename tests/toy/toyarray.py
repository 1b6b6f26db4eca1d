"""A toy array library: what a library of your own looks like to portacnn. Its device is imaginary.

An ``Array`` lies in the memory of the device "toy:0" and never hands a value to the host by itself:
``fetch`` is the only way back. The functions of this module are those of the Python array API
standard; most of them are NumPy's, which works on what stands for the device's memory here.
docs/backends.md makes a backend of it.
"""

import operator
from typing import Any

import numpy as np

__version__ = "1.0"


class Device:
    """The only device."""

    def __str__(self) -> str:
        return "toy:0"


TOY = Device()


class Array:
    """An array on the device. ``memory`` is what other code must not touch."""

    __slots__ = ("memory",)

    def __init__(self, memory: Any) -> None:
        self.memory = np.asarray(memory)

    shape = property(lambda self: self.memory.shape)
    dtype = property(lambda self: self.memory.dtype)
    ndim = property(lambda self: self.memory.ndim)
    size = property(lambda self: self.memory.size)
    device = property(lambda self: TOY)
    T = property(lambda self: Array(self.memory.T))
    mT = property(lambda self: Array(self.memory.swapaxes(-1, -2)))  # noqa: N815

    def fetch(self) -> np.ndarray:
        """Copy the values to the host."""
        return self.memory.copy()

    def __getitem__(self, key: Any) -> "Array":
        return Array(self.memory[on_device(key)])  # a slice is a view of the same memory

    def __setitem__(self, key: Any, value: Any) -> None:
        self.memory[on_device(key)] = on_device(value)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        import toyarray

        return toyarray

    def __float__(self) -> float:
        return float(self.fetch())

    def __int__(self) -> int:
        return int(self.fetch())

    def __bool__(self) -> bool:
        return bool(self.fetch())

    def __index__(self) -> int:
        return operator.index(self.fetch()[()])

    def __repr__(self) -> str:
        return f"toyarray.Array({self.memory}, device=toy:0)"


def on_device(value: Any) -> Any:
    """The device's memory of an array, or of the arrays in a tuple or list; other values as they
    are."""
    if isinstance(value, Array):
        return value.memory
    if isinstance(value, tuple | list):
        return type(value)(map(on_device, value))
    return value


def as_arrays(value: Any) -> Any:
    """Results of NumPy as arrays of this library."""
    if isinstance(value, np.ndarray | np.generic):
        return Array(value)
    if isinstance(value, tuple | list):
        return type(value)(map(as_arrays, value))
    return value


def binary(name: str) -> Any:
    def method(self: Array, other: Any) -> Any:
        result = getattr(self.memory, name)(on_device(other))
        return result if result is NotImplemented else Array(result)

    return method


def in_place(name: str) -> Any:
    function = getattr(operator, name)

    def method(self: Array, other: Any) -> Array:
        function(self.memory, on_device(other))  # NumPy writes into the memory
        return self

    return method


ARITHMETIC = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()  # noqa: SIM905
for _name in ARITHMETIC:
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Array, _form, binary(_form))
    setattr(Array, f"__i{_name}__", in_place(f"__i{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Array, f"__{_name}__", binary(f"__{_name}__"))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(
        Array,
        f"__{_name}__",
        lambda self, name=f"__{_name}__": Array(getattr(self.memory, name)()),
    )


# --- the namespace --------------------------------------------------------------------------------


def asarray(obj: Any, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Array:
    return Array(np.array(on_device(obj), dtype=dtype, copy=copy))


def astype(x: Array, dtype: Any, *, copy: bool = True, device: Any = None) -> Array:
    return Array(x.memory.astype(dtype, copy=copy))


def clip(x: Array, min: Any = None, max: Any = None) -> Array:
    return Array(np.clip(x.memory, on_device(min), on_device(max)))


class __array_namespace_info__:  # noqa: N801 (the standard's name)
    """What the library has: all real dtypes."""

    def dtypes(self, *, device: Any = None, kind: Any = None) -> dict[str, Any]:
        return np.__array_namespace_info__().dtypes(kind=kind)


def __getattr__(name: str) -> Any:
    """Every other function and dtype of the standard: NumPy's, on the device's memory."""
    found = getattr(np, name)
    if isinstance(found, type) or not callable(found):
        return found  # a dtype, or a constant

    def function(*args: Any, device: Any = None, **options: Any) -> Any:
        options = {key: on_device(value) for key, value in options.items()}
        return as_arrays(found(*map(on_device, args), **options))

    globals()[name] = function
    return function
