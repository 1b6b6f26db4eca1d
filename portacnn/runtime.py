"""Array libraries and devices: ``Backend``, ``resolve`` and the registry of adapters.

A *backend* is an array library used through the Python array API standard, together with one of its
devices and what the standard lacks: transfers from and to host memory, synchronization, fast
kernels. This module imports no array library. Each library has an *adapter*, a module that is
imported on first use. It has two functions and some constants:

    KINDS                 the device kinds it supports, such as {"cpu"} or {"cpu", "cuda"}
    REFUSED               optional: unsupported array types by name ("MaskedArray"), each with the
        fix
    probe()               -> BackendInfo: version and devices, or the reason why it is unavailable
    connect(device)       -> Backend; ``device`` is text such as "cuda:1"; None: the default

The built-in adapters are listed in ``_BUILT_IN``. Other packages register theirs in the entry point
group ``portacnn.backends``: the name of the entry point is the top-level module of the array
library, its value an adapter.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from portacnn.device_runtime import NOTHING, DeviceRuntime
from portacnn.device_runtime import Array as Array
from portacnn.device_runtime import HostArray as HostArray
from portacnn.errors import ArrayError, BackendError, ModelFormatError, NotFiniteError

VARIABLE = "PORTACNN_BACKEND"
GRAMMAR = (
    "cpu, cuda, cuda:1, numpy, cupy, cupy:1, torch, torch:cuda:0, torch:mps, jax, jax:cuda:0, "
    "array_api_strict:device1, auto"
)
_GROUP = "portacnn.backends"
_BUILT_IN = {
    "numpy": "portacnn.backends.numpy.adapter",
    "cupy": "portacnn.backends.cupy.adapter",
    "torch": "portacnn.backends.torch.adapter",
    "array_api_strict": "portacnn.backends.strict",
    "jax": "portacnn.backends.jax.adapter",
}
_MODULES = {"jaxlib": "jax"}
"""The backend of the arrays of a module that is not named like it."""
_COMPILED = {"numpy": {"numba": "portacnn.backends.numba.kernels"}}
"""Kernel sets that a compiler library adds to a backend, by that library's name: modules with a
table KERNELS."""
_DEFAULT_FOR_KIND = {"cpu": "numpy", "cuda": "cupy"}
_REFUSALS = (BufferError, RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError)
"""The exceptions that libraries raise if they do not export an array."""
_HOST = 1  # DLPack's code of the CPU
_log = logging.getLogger("portacnn")


class Kernel(NamedTuple):
    """A backend's implementation of an op: the two functions of ``portacnn.ops.dispatch.Op``.

    ``prepare`` is for repeated inference on arrays of one shape, when the overhead of a call
    matters; see ``Op.prepare``. ``complex`` tells whether the functions take complex arrays;
    without it, those go to the op's portable functions.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None
    complex: bool = False


class _Deferred(Mapping[str, Kernel]):
    """A module's table of kernels. The module, whose library may take seconds to load, is imported
    by the first op.
    """

    def __init__(self, module: str, load: Callable[[str], Any]) -> None:
        self._module, self._load = module, load

    @cached_property
    def _table(self) -> Mapping[str, Kernel]:
        return self._load(self._module).KERNELS

    def get(self, name: str, default: Any = None) -> Any:
        return self._table.get(name, default)

    def __getitem__(self, name: str) -> Kernel:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def kernel_sets(
    name: str, native: Mapping[str, Kernel], load: Callable[[str], Any] = importlib.import_module
) -> Mapping[str, Mapping[str, Kernel]]:
    """Return the kernel sets of the backend ``name``, the fastest first: those of installed
    compilers, then its own.

    ``load`` imports a module by name when the first op needs its kernels.
    """
    compiled = {
        library: _Deferred(module, load)
        for library, module in _COMPILED.get(name, {}).items()
        if find_spec(library)
    }
    return {**compiled, "native": native}


@dataclass(frozen=True)
class Backend(DeviceRuntime):
    """An array library on one device, with what the array API standard lacks. Adapters derive from
    it.

    An adapter must define name, namespace, device and ``to_host``. Everything else has a default,
    here and in ``DeviceRuntime``.

    Attributes:
        name: the library, as in ``PORTACNN_BACKEND``.
        xp: its array API namespace, from array-api-compat.
        device: the library's own device object, the argument ``device=`` of its creation functions.
        layout: the preferred memory layout of activations. Shapes are NCHW in both cases.
            "batch_last" keeps the bytes in the order (C, H, W, N) under a permuted view,
            "batch_first" in (N, C, H, W). A preference, not a contract.
        kernels: the kernel sets by name, the fastest first. Each is a table of overrides by op
            name. "native" has the library's own fast functions; "numba" has kernels compiled by
            numba for its arrays.
        views_alias: whether a slice of an array is always a view of its memory. The standard does
            not define this.
        wraps: whether arrays of this backend wrap the library's own (``backends.immutable``), which
            the methods ``is_own``, ``taken`` and ``given_back`` recognize and convert.
    """

    views_alias: ClassVar[bool] = False
    wraps: ClassVar[bool] = False

    name: str
    xp: Any
    device: Any
    layout: Literal["batch_last", "batch_first"] = "batch_last"
    kernels: Mapping[str, Mapping[str, Kernel]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def __str__(self) -> str:
        return f"{self.name} on {self.place(self.device)}"

    def place(self, device: Any) -> str:
        """Return the name of one of this library's devices, in the form that ``resolve``
        accepts.
        """
        return str(device)

    def __deepcopy__(self, memo: Any) -> "Backend":
        return self

    def __reduce__(self) -> Any:
        """Pickle the name and the device. The device must exist when the backend is unpickled."""
        return resolve, (f"{self.name}:{self.place(self.device)}",)

    def dtype(self, name: str) -> Any:
        """Return the library's dtype object for a standard name such as "float32"."""
        return getattr(self.xp, name)

    def asarray(self, host: HostArray, dtype: str | None = None) -> Array:
        """Copy a NumPy array to this device. The result never shares memory with ``host``.
        ``dtype``: a standard name.
        """
        return self.xp.asarray(
            host, dtype=dtype and self.dtype(dtype), device=self.device, copy=True
        )

    def share(self, host: HostArray) -> Array:
        """Return a NumPy array on this device, without a copy if possible. The result must not be
        written to.
        """
        return self.asarray(host)

    def receive(self, array: Any) -> Array:
        """Return an array of any library as one of this backend, sharing its memory. NumPy arrays
        are returned unchanged.

        Raises:
            ArrayError: if it lies on another device, is not an array, or its library does not
                export it (DLPack).
        """
        try:
            source: Backend | None = backend_of(array)
        except ArrayError:
            if _library(type(array)) or not hasattr(array, "__dlpack__"):
                raise
            source = None
        name = source and source.name
        if name == "numpy" or (name == self.name and array.device == self.device):
            return array
        if name != self.name:
            try:
                theirs = (
                    source.dlpack_device(array) if source else Backend.dlpack_device(self, array)
                )
                if theirs == self.dlpack_device(self.xp.empty((0,), device=self.device)):
                    # Through NumPy on the host, because torch aborts the process if a stride is
                    # negative.
                    xp = resolve("numpy").xp if theirs[0] == _HOST else self.xp
                    return xp.from_dlpack(array)
            except _REFUSALS as error:
                raise ArrayError(
                    f"{describe(array)} cannot be shared with {self} by DLPack: {error}"
                ) from error
        raise ArrayError(
            f"the model is on {self}, the images are {describe(array)}; move one of them"
        )

    def is_own(self, value: Any) -> bool:
        """Return whether it is an array of the library that this backend would wrap."""
        return False

    def taken(self, value: Any) -> Any:
        """Return arrays of the library as those of this backend: one, or a structure of them."""
        return value

    def given_back(self, value: Any) -> Any:
        """Return arrays of this backend as the library's: one, or a structure of them."""
        return value

    def returned(self, value: Any, given: Any) -> Any:
        """Return a result, an array of this backend, to a caller who has passed ``given``: as an
        array of the library if that is one.
        """
        return self.given_back(value) if self.wraps and self.is_own(given) else value

    def dlpack_device(self, array: Array) -> tuple[int, int]:
        """Return (device kind, device index) of an array in DLPack's numbering."""
        kind, number = array.__dlpack_device__()
        return int(kind), int(number)

    def run(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Return ``function(*args, **options)``, portable code that computes matrix products.

        An adapter overrides this if the library needs a setting for it, such as BLAS on one thread.
        Calls may be nested.
        """
        return function(*args, **options)

    def to_host(self, array: Array) -> HostArray:
        """Return the array's values as a new NumPy array; waits for the device."""
        raise NotImplementedError

    def contiguous(self, array: Array) -> Array:
        """Return ``array`` itself if its memory is in the order of its axes, else such a copy."""
        packed = self.xp.empty(array.shape, dtype=array.dtype, device=array.device)
        packed[...] = array
        return packed

    def as_real(self, array: Array) -> Array:
        """Return a complex array (...) as real numbers (..., 2): the real and the imaginary
        parts.
        """
        return self.xp.stack([self.xp.real(array), self.xp.imag(array)], axis=-1)

    def as_complex(self, parts: Array) -> Array:
        """Return the complex array (...) of real and imaginary parts (..., 2).

        The standard has no function for it. Of an infinite imaginary part, this product makes a
        real part of NaN; adapters override it.
        """
        dtype = self.dtype(_COMPLEX_OF[dtype_name(parts)])
        re, im = (self.xp.astype(parts[..., i], dtype) for i in (0, 1))
        return re + 1j * im


@dataclass(frozen=True)
class BackendInfo:
    """The entry of one backend in ``available_backends``. ``reason`` is None if the backend can be
    used.
    """

    name: str
    version: str | None
    devices: tuple[str, ...]
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.name}: not usable: {self.reason}"
        return f"{self.name} {self.version}: {', '.join(self.devices)}"


class Adapter(Protocol):
    """The interface of an adapter module (see the head of this file)."""

    KINDS: frozenset[str]

    def probe(self) -> BackendInfo: ...

    def connect(self, device: str | None) -> Backend: ...


# --- the registry ---------------------------------------------------------------------------------


@cache
def _foreign() -> dict[str, Any]:
    from importlib.metadata import entry_points  # takes as long as a module of ours

    return {point.name: point for point in entry_points(group=_GROUP)}


_given: dict[str, Adapter] = {}
"""The adapters of namespaces that ``resolve`` was given."""


def backend_names() -> list[str]:
    """Return the names that ``resolve`` accepts: the built-in backends, then those of installed
    packages, then those of namespaces that it was given.
    """
    others = (name for name in (*_foreign(), *_given) if name not in _BUILT_IN)
    return [*_BUILT_IN, *others]


def _name_of(namespace: Any) -> str:
    """Return the name of the backend of a namespace that follows the array API standard. If it has
    none, it gets one by the standard alone (``backends.immutable``)."""
    known, parts = backend_names(), namespace.__name__.split(".")
    for part in parts:
        if part in known:
            return str(part)
    module = importlib.import_module("portacnn.backends.immutable")
    _given[parts[0]] = module.StandardAdapter(parts[0], namespace)
    return str(parts[0])


@cache
def _adapter(name: str) -> Adapter:
    if name in _BUILT_IN:
        return importlib.import_module(_BUILT_IN[name])
    if name in _foreign():
        return _foreign()[name].load()
    if name in _given:
        return _given[name]
    raise BackendError(
        f"unknown backend {name!r}; expected one of {', '.join(backend_names())}, auto"
    )


def available_backends() -> list[BackendInfo]:
    """Return every backend with its version and devices, or the reason why it is unavailable.
    Imports each library.
    """
    return [backend_info(name) for name in backend_names()]


def backend_info(name: str) -> BackendInfo:
    """Return the version and devices of one backend, or the reason why it is unavailable."""
    try:
        return _adapter(name).probe()
    # a third-party adapter may raise anything; the other backends are still listed
    except Exception as error:
        return BackendInfo(name, None, (), f"its adapter fails: {type(error).__name__}: {error}")


# --- from a name to a backend ---------------------------------------------------------------------


def _split(text: str) -> tuple[str | None, str | None]:
    """Split text into backend and device: ``"torch:cuda:0"`` -> ("torch", "cuda:0"); ``"cuda:1"``
    -> (None, "cuda:1").
    """
    head, _, rest = text.strip().partition(":")
    if head == "auto" or head in backend_names():
        return head, rest or None
    return None, text.strip() or None


def _kind(device: str | None) -> str | None:
    return device and device.partition(":")[0]


def resolve(
    device: "str | Backend | ModuleType | None" = None, backend: str | None = None
) -> Backend:
    """Return the backend named by the arguments, else by ``PORTACNN_BACKEND``, else NumPy.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; or a backend with or without a device:
            ``"numpy"``, ``"cupy:1"``, ``"torch:cuda:0"``, ``"array_api_strict:device1"``.
            ``"auto"`` uses CUDA if a device responds, and logs its choice. A ``Backend`` is
            returned unchanged. An imported namespace that follows the array API standard is a
            backend too, also if its arrays are immutable.
        backend: the name of a backend; ``device`` is then a device of that library.

    An explicit argument takes precedence over the variable. ``"cuda"`` means CuPy unless a backend
    is named. If the variable's backend does not support a plain device (``"cpu"`` under
    ``PORTACNN_BACKEND=cupy``), the default backend for that device is used.

    Raises:
        BackendError: if a name is unknown, the arguments contradict each other, or the backend or
            device is unavailable. The message says what to do.

    Example:
        >>> portacnn.resolve("cpu").name
        'numpy'
    """
    if isinstance(device, Backend):
        if backend is not None and backend != device.name:
            raise BackendError(
                f"backend={backend!r} contradicts device={device}; pass one of the two"
            )
        return device
    if hasattr(device, "__array_namespace_info__") or (
        isinstance(device, ModuleType) and hasattr(device, "asarray")
    ):
        device = _name_of(device)
    for word, value in (("device", device), ("backend", backend)):
        if value is not None and not isinstance(value, str):
            raise BackendError(
                f"{word} must be text such as {GRAMMAR}; got {value!r} ({type(value).__name__})"
            )
    wanted, where = _split(device) if device else (None, None)
    if backend:
        named, place = _split(backend)
        if named is None:
            raise BackendError(
                f"unknown backend {backend!r}; expected one of {', '.join(backend_names())}, auto"
            )
        if wanted not in (None, named) or (
            where and place and where != place and not where.endswith(f":{place}")
        ):
            raise BackendError(
                f"backend={backend!r} contradicts device={device!r}; pass one of the two"
            )
        wanted, where = named, where or place
    source = ""
    if wanted is None and (variable := os.environ.get(VARIABLE, "").strip()):
        named, place = _split(variable)
        if named is None and _kind(place) not in _DEFAULT_FOR_KIND:
            raise BackendError(
                f"{VARIABLE}={variable!r} is not a backend or device; expected one of {GRAMMAR}"
            )
        if where is None:
            wanted, where, source = named, place, f" (from {VARIABLE}={variable})"
        elif named not in (None, "auto") and (
            _kind(where) in _adapter(named).KINDS or _kind(where) not in _DEFAULT_FOR_KIND
        ):
            wanted, source = named, f" (from {VARIABLE}={variable})"
    if wanted == "auto":
        return _choose(where)
    if wanted is None:
        kind = _kind(where) or "cpu"
        if kind not in _DEFAULT_FOR_KIND:
            raise BackendError(f"unknown device {device!r}; expected one of {GRAMMAR}")
        wanted = _DEFAULT_FOR_KIND[kind]
    try:
        return _adapter(wanted).connect(where)
    except BackendError as error:
        raise BackendError(f"{error}{source}") from None


def _choose(where: str | None) -> Backend:
    """Return CuPy if a CUDA device responds, else NumPy. Logs the choice and the reason."""
    if where is not None:
        raise BackendError(
            f"auto accepts no device, got 'auto:{where}'; name the backend instead: {GRAMMAR}"
        )
    info = _adapter("cupy").probe()
    chosen = _adapter("numpy" if info.reason else "cupy").connect(None)
    _log.warning("auto chose %s%s", chosen, f" ({info})" if info.reason else "")
    return chosen


# --- from arrays to a backend ---------------------------------------------------------------------

_by_type: dict[type, Backend] = {}


def backend_of(array: Array) -> Backend:
    """Return the backend of an array's library, found by the array's type. Its ``device`` is the
    library's default; use the array's device instead.

    Raises:
        ArrayError: if the library of the array has no backend.
    """
    try:
        return _by_type[type(array)]
    except KeyError:
        return _learn(type(array), array)


def _library(kind: type) -> str | None:
    """Return the name of the backend that an array type or one of its base classes belongs to, or
    None. A class of a backend itself names it in ``portacnn_backend``.
    """
    own: str | None = getattr(kind, "portacnn_backend", None)
    if own is not None:
        return own
    roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
    names = (_MODULES.get(root, root) for root in roots)
    return next((name for name in names if name in backend_names()), None)


def _learn(kind: type, array: Array) -> Backend:
    name = _library(kind)
    if name is None:
        raise ArrayError(
            f"expected an array of {', '.join(backend_names())}; got "
            f"{kind.__module__}.{kind.__qualname__}"
            + (
                " (numpy.asarray(...) makes an array of it)"
                if isinstance(array, list | tuple | int | float) or hasattr(array, "__array__")
                else ""
            )
        )
    refused: Mapping[str, str] = getattr(_adapter(name), "REFUSED", {})
    for base in kind.__mro__:
        if base.__name__ in refused:
            raise ArrayError(
                f"{kind.__module__}.{kind.__qualname__} is not supported: {refused[base.__name__]}"
            )
    _by_type[kind] = _adapter(name).connect(None)
    return _by_type[kind]


def where(array: Array) -> AbstractContextManager[Any]:
    """Return ``Backend.active`` for the device of the array."""
    backend = backend_of(array)
    return (backend.elsewhere(array.device) if backend.enters else None) or NOTHING


def dtype_name(array: Array) -> str:
    """Return the standard name of the array's dtype, such as "float32", for any library."""
    return str(array.dtype).rpartition(".")[2]


_COMPLEX_OF = {"float32": "complex64", "float64": "complex128"}
_PART_OF = {whole: part for part, whole in _COMPLEX_OF.items()}


@lru_cache(maxsize=1024)
def part_dtype(xp: Any, dtype: Any) -> Any:
    """Return the dtype of the real and imaginary parts of complex64 and complex128, for either byte
    order; None for every other dtype.
    """
    part = _PART_OF.get(
        str(dtype.newbyteorder("=") if hasattr(dtype, "newbyteorder") else dtype).rpartition(".")[2]
    )
    return part and getattr(xp, part)


@lru_cache(maxsize=1024)
def is_float(xp: Any, dtype: Any) -> bool:
    """Return whether ``dtype`` is a real floating-point type of the namespace ``xp`` with more than
    8 bits.
    """
    return bool(xp.isdtype(dtype, "real floating")) and "float8" not in str(dtype)


def describe(array: Array) -> str:
    """Describe an array for error messages: ``100x6x14x14, cupy float32 on cuda:0``."""
    try:
        backend = backend_of(array)
    except ArrayError:
        return f"{type(array).__module__}.{type(array).__qualname__}"
    shape = "x".join(str(n) for n in array.shape) or "0-dimensional"
    return f"{shape}, {backend.name} {dtype_name(array)} on {backend.place(array.device)}"


def cast(array: Array, dtype: Any) -> Array:
    """Convert an array to another dtype of its library; returns the array itself if it has that
    dtype. For values from outside.

    Raises:
        NotFiniteError: if values are beyond the range of the new dtype and would become infinite.
            The check reads one boolean from the device.
    """
    if array.dtype == dtype:
        return array
    backend = backend_of(array)
    xp = backend.xp
    with where(array):
        new = xp.astype(array, dtype)
        if not (
            is_float(xp, array.dtype)
            and is_float(xp, dtype)
            and xp.finfo(array.dtype).max > xp.finfo(dtype).max
        ):
            return new
        if not bool(backend.to_host(xp.any(xp.isinf(new)))):
            return new
        lost = xp.isinf(new) & xp.isfinite(array)
        if not bool(backend.to_host(xp.any(lost))):
            return new
        largest = float(backend.to_host(xp.max(xp.where(lost, xp.abs(array), 0.0))))
    raise NotFiniteError(
        f"{describe(array)} holds {largest:.3g}, beyond the range of {dtype_name(new)} (up to "
        f"{float(xp.finfo(dtype).max):.3g})"
    )


def taken(home: Backend, host: HostArray, dtype: Any, where: str) -> Array:
    """Return an array of a state on the device of ``home``, in this dtype.

    Raises:
        ModelFormatError: if values are beyond the range of the dtype.
        ArrayError: if the array is masked.
    """
    backend_of(host)
    try:
        return cast(home.share(host), dtype)
    except NotFiniteError as error:
        raise ModelFormatError(error.message, where) from error
