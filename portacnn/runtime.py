"""Which array library, on which device: ``Backend``, ``resolve`` and the registry of adapters.

A *backend* is an array library seen through the Python array API standard, together with one of its
devices and the few things the standard lacks (coming from and going to host memory, waiting for the
device, fast kernels). This module imports no array library. Each one has an *adapter*, a module
with two functions and some constants, which is loaded when it is first asked for:

    KINDS                 the device kinds it can serve, such as {"cpu"} or {"cpu", "cuda"}
    REFUSED               optional: array types refused by name ("MaskedArray"), each with the fix
    probe()               -> BackendInfo: version and devices, or the reason why it cannot be used
    connect(device)       -> Backend; ``device`` is text such as "cuda:1"; None: the default

The built-in adapters stand in ``_BUILT_IN``. Other packages add theirs through the entry-point
group ``portacnn.backends``: the entry point's name is the top-level module of the array library,
its value an adapter.
"""

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from portacnn.device_runtime import NOTHING, DeviceRuntime
from portacnn.device_runtime import Array as Array
from portacnn.device_runtime import HostArray as HostArray
from portacnn.errors import ArrayError, BackendError, ModelFormatError, NotFiniteError

VARIABLE = "PORTACNN_BACKEND"
GRAMMAR = (
    "cpu, cuda, cuda:1, numpy, cupy, cupy:1, torch, torch:cuda:0, torch:mps, "
    "array_api_strict:device1, auto"
)
_GROUP = "portacnn.backends"
_BUILT_IN = {
    "numpy": "portacnn.backends.numpy.adapter",
    "cupy": "portacnn.backends.cupy.adapter",
    "torch": "portacnn.backends.torch.adapter",
    "array_api_strict": "portacnn.backends.strict",
}
_COMPILED = {"numpy": {"numba": "portacnn.backends.numba.kernels"}}
"""Kernel sets that another library compiles for a backend's arrays, by that library's name: modules
with a table KERNELS."""
_DEFAULT_FOR_KIND = {"cpu": "numpy", "cuda": "cupy"}
_REFUSALS = (BufferError, RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError)
"""What libraries raise where they do not hand an array over."""
_HOST = 1  # DLPack's number for the CPU
_log = logging.getLogger("portacnn")


class Kernel(NamedTuple):
    """A backend's own version of an op: the two functions of ``portacnn.ops.dispatch.Op``, as a
    pair.

    ``prepare`` is for inference over and over on arrays of one shape, where a call's own cost
    counts; see ``Op.prepare``.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    prepare: Callable[..., Any] | None = None


class _Deferred(Mapping[str, Kernel]):
    """A module's table of kernels. The module, whose library may take seconds to load, is imported
    by the first op."""

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
    """Return the kernel sets of the backend ``name``, the fastest first: those that installed
    libraries compile, and its own.

    ``load`` imports a module by its name, when the first op asks for its kernels.
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

    What every adapter must say: its name, namespace and device, and ``to_host``. Everything else
    has a default, here and in ``DeviceRuntime``.

    Attributes:
        name: the library, as in ``PORTACNN_BACKEND``.
        xp: its namespace, by way of array-api-compat.
        device: the library's own device object, what ``device=`` of its creation functions takes.
        layout: how activations should lie in memory. Shapes are NCHW either way: "batch_last" keeps
            the bytes in the order (C, H, W, N) under a permuted view, "batch_first" in (N, C, H,
            W). A preference, never a contract.
        kernels: its kernel sets, the fastest first: tables of overrides by the op's name, under the
            set's name. "native" is what the library itself is good at; "numba" what numba compiles
            for its arrays.
        views_alias: whether a slice of an array is a view of its memory, always; the standard
            leaves that open.
    """

    views_alias: ClassVar[bool] = False

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
        """A device of this library in the words that ``resolve`` takes."""
        return str(device)

    def __deepcopy__(self, memo: Any) -> "Backend":
        return self

    def __reduce__(self) -> Any:
        """In a pickle a backend is its name and device; where it comes back that device must be
        there."""
        return resolve, (f"{self.name}:{self.place(self.device)}",)

    def dtype(self, name: str) -> Any:
        """The library's dtype object for a standard name such as "float32"."""
        return getattr(self.xp, name)

    def asarray(self, host: HostArray, dtype: str | None = None) -> Array:
        """Copy a NumPy array to this device; never shares memory with ``host``. ``dtype``: a
        standard name."""
        return self.xp.asarray(
            host, dtype=dtype and self.dtype(dtype), device=self.device, copy=True
        )

    def share(self, host: HostArray) -> Array:
        """A NumPy array on this device, in its own memory where that is possible, else a copy. It
        is not to be written to."""
        return self.asarray(host)

    def receive(self, array: Any) -> Array:
        """An array of any library as one of this backend's, in the same memory; NumPy's come back
        as they are, to be sent.

        Raises:
            ArrayError: it lies on another device, is no array, or its library does not hand it over
                (DLPack).
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
                    # By way of NumPy on the host: torch ends the process where a stride is
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

    def dlpack_device(self, array: Array) -> tuple[int, int]:
        """The kind of device, by DLPack's numbers, and which of them, that an array lies on."""
        kind, number = array.__dlpack_device__()
        return int(kind), int(number)

    def run(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
        """Return ``function(*args, **options)``: portable code that multiplies matrices.

        An adapter overrides it if the library needs a setting for that, such as BLAS on one thread.
        Calls may be nested.
        """
        return function(*args, **options)

    def to_host(self, array: Array) -> HostArray:
        """The array's values as a NumPy array of its own; waits for the device."""
        raise NotImplementedError

    def contiguous(self, array: Array) -> Array:
        """``array`` itself where its memory already lies in the order of its axes, else a copy that
        does."""
        packed = self.xp.empty(array.shape, dtype=array.dtype, device=array.device)
        packed[...] = array
        return packed


@dataclass(frozen=True)
class BackendInfo:
    """What ``available_backends`` tells of one backend. ``reason`` is None where it can be used."""

    name: str
    version: str | None
    devices: tuple[str, ...]
    reason: str | None = None

    def __str__(self) -> str:
        if self.reason is not None:
            return f"{self.name}: not usable: {self.reason}"
        return f"{self.name} {self.version}: {', '.join(self.devices)}"


class Adapter(Protocol):
    """The form of an adapter module (see the head of this file)."""

    KINDS: frozenset[str]

    def probe(self) -> BackendInfo: ...

    def connect(self, device: str | None) -> Backend: ...


# --- the registry ---------------------------------------------------------------------------------


@cache
def _foreign() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def backend_names() -> list[str]:
    """The names ``resolve`` knows: the built-in backends, then those of installed packages."""
    return [*_BUILT_IN, *(name for name in _foreign() if name not in _BUILT_IN)]


@cache
def _adapter(name: str) -> Adapter:
    if name in _BUILT_IN:
        return importlib.import_module(_BUILT_IN[name])
    if name in _foreign():
        return _foreign()[name].load()
    raise BackendError(
        f"unknown backend {name!r}; known are {', '.join(backend_names())}, and auto"
    )


def available_backends() -> list[BackendInfo]:
    """Every backend with its version and devices, or the reason why it cannot be used. Imports each
    library."""
    return [_probe(name) for name in backend_names()]


def _probe(name: str) -> BackendInfo:
    try:
        return _adapter(name).probe()
    # somebody else's adapter: whatever it does, the others are to be listed
    except Exception as error:
        return BackendInfo(name, None, (), f"its adapter fails: {type(error).__name__}: {error}")


# --- from words to a backend ----------------------------------------------------------------------


def _split(text: str) -> tuple[str | None, str | None]:
    """``"torch:cuda:0"`` -> ("torch", "cuda:0"); ``"cuda:1"`` -> (None, "cuda:1")."""
    head, _, rest = text.strip().partition(":")
    if head == "auto" or head in backend_names():
        return head, rest or None
    return None, text.strip() or None


def _kind(device: str | None) -> str | None:
    return device and device.partition(":")[0]


def resolve(device: "str | Backend | None" = None, backend: str | None = None) -> Backend:
    """The backend that these words, or else the variable ``PORTACNN_BACKEND``, or else nothing
    (NumPy) ask for.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``; or a backend with or without one of its
            devices: ``"numpy"``, ``"cupy:1"``, ``"torch:cuda:0"``, ``"array_api_strict:device1"``;
            ``"auto"`` takes CUDA where it answers and says what it took. A ``Backend`` is handed
            back as it is.
        backend: a backend's name; then ``device`` is that library's own.

    An explicit argument comes before the variable. ``"cuda"`` means CuPy unless a backend is named;
    a plain device that the variable's backend cannot serve (``"cpu"`` under
    ``PORTACNN_BACKEND=cupy``) goes to the one that can.

    Raises:
        BackendError: for an unknown name, a contradiction, or something that cannot be had here; it
            says what to do.
    """
    if isinstance(device, Backend):
        if backend is not None and backend != device.name:
            raise BackendError(
                f"backend={backend!r} contradicts device={device}; give one of the two"
            )
        return device
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
                f"unknown backend {backend!r}; known are {', '.join(backend_names())}, and auto"
            )
        if wanted not in (None, named) or (
            where and place and where != place and not where.endswith(f":{place}")
        ):
            raise BackendError(
                f"backend={backend!r} contradicts device={device!r}; give one of the two"
            )
        wanted, where = named, where or place
    source = ""
    if wanted is None and (variable := os.environ.get(VARIABLE, "").strip()):
        named, place = _split(variable)
        if named is None and _kind(place) not in _DEFAULT_FOR_KIND:
            raise BackendError(
                f"{VARIABLE}={variable!r} is not a backend or device; it can be {GRAMMAR}"
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
            raise BackendError(f"unknown device {device!r}; it can be {GRAMMAR}")
        wanted = _DEFAULT_FOR_KIND[kind]
    try:
        return _adapter(wanted).connect(where)
    except BackendError as error:
        raise BackendError(f"{error}{source}") from None


def _choose(where: str | None) -> Backend:
    """``auto``: CuPy where a CUDA device answers, else NumPy; says which, and why not the other."""
    if where is not None:
        raise BackendError(
            f"auto takes no device, got 'auto:{where}'; name the backend instead: {GRAMMAR}"
        )
    info = _adapter("cupy").probe()
    chosen = _adapter("numpy" if info.reason else "cupy").connect(None)
    _log.warning("auto chose %s%s", chosen, f" ({info})" if info.reason else "")
    return chosen


# --- from arrays to a backend ---------------------------------------------------------------------

_by_type: dict[type, Backend] = {}


def backend_of(array: Array) -> Backend:
    """The backend of an array's library, found by its type. Its ``device`` is the library's
    default: use the array's.

    Raises:
        ArrayError: where the array's library has no backend here.
    """
    try:
        return _by_type[type(array)]
    except KeyError:
        return _learn(type(array), array)


def _library(kind: type) -> str | None:
    """The backend that a type of arrays belongs to, itself or by what it is derived from."""
    roots = (base.__module__.partition(".")[0] for base in kind.__mro__)
    return next((root for root in roots if root in backend_names()), None)


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
    """``Backend.active`` for the array's device."""
    backend = backend_of(array)
    return (backend.elsewhere(array.device) if backend.enters else None) or NOTHING


def dtype_name(array: Array) -> str:
    """The dtype's name in the standard: "float32" for NumPy's, torch's and every other
    library's."""
    return str(array.dtype).rpartition(".")[2]


@lru_cache(maxsize=1024)
def is_float(xp: Any, dtype: Any) -> bool:
    """Whether ``dtype`` is a real floating-point type of the namespace ``xp``, wide enough to
    compute with (8 bits are not)."""
    return bool(xp.isdtype(dtype, "real floating")) and "float8" not in str(dtype)


def describe(array: Array) -> str:
    """``100x6x14x14, cupy float32 on cuda:0``, for error messages."""
    try:
        backend = backend_of(array)
    except ArrayError:
        return f"{type(array).__module__}.{type(array).__qualname__}"
    shape = "x".join(str(n) for n in array.shape) or "0-dimensional"
    return f"{shape}, {backend.name} {dtype_name(array)} on {backend.place(array.device)}"


def cast(array: Array, dtype: Any) -> Array:
    """The array in another dtype of its library; itself where it has it. For values that enter from
    outside.

    Raises:
        NotFiniteError: numbers beyond the new dtype's range, which would become infinite. Reads one
            boolean from the device.
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
    """A state's array on the device, in this dtype. Raises ModelFormatError where that does not
    hold it, ArrayError if masked."""
    backend_of(host)
    try:
        return cast(home.share(host), dtype)
    except NotFiniteError as error:
        raise ModelFormatError(error.message, where) from error
