"""How an op finds the code that computes it: the portable pair written here, or a backend's own
pair.

An op is a pair of functions. The forward takes arrays and plain values and gives back ``(result,
saved)``, where ``saved`` is whatever its backward needs, or None when it was told not to keep
anything. The backward takes the gradient of the result and ``saved``. A backend overrides an op by
putting a ``Kernel(forward, backward)`` of the same signatures under the op's name into one of its
kernel sets. Its forward may decline a case by returning ``NotImplemented``: then the next set's
runs, and the portable pair at last. What was saved travels in a ``Cache`` that names its maker, so
each backward gets what its own forward kept.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, partial, update_wrapper, wraps
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

from portacnn.arguments import one_of
from portacnn.errors import ArgumentError, ArrayError, StateError
from portacnn.runtime import Array, Backend, Kernel, backend_of, describe, is_float

VARIABLE = "PORTACNN_KERNELS"
_CHOICES = ("auto", "numba", "native", "reference")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "3xtf32")


def _checked(choice: str, source: str) -> str:
    if choice not in _CHOICES:
        raise ArgumentError(f"{source} must be one of {', '.join(_CHOICES)}; got {choice!r}")
    if choice == "numba" and find_spec("numba") is None:
        raise ArgumentError(
            f'{source} is "numba", which is not installed: pip install "portacnn[jit]"'
        )
    return choice


_choice: ContextVar[str | None] = ContextVar("portacnn_kernels", default=None)


@cache
def _from_environment() -> str:
    return _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def kernel_choice() -> str:
    """The choice that holds here: "auto" or a kernel set (see ``use_kernels``). Raises
    ArgumentError for another word."""
    return _choice.get() or _from_environment()


@contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Within ``with use_kernels("reference"):`` only the portable ops run, as under
    ``PORTACNN_KERNELS=reference``.

    Args:
        choice: the kernel set to begin with. "numba": kernels that numba compiles for NumPy arrays;
            "native": what the array library itself does fast; "reference": the portable ops alone.
            What a set declines goes to the next in this order. "auto" begins with the fastest set
            that the backend has, and so does the name of a set that it lacks.

    It holds for the current thread (a context variable).
    """
    token = _choice.set(_checked(choice, "use_kernels(...)"))
    try:
        yield
    finally:
        _choice.reset(token)


_precision: ContextVar[str] = ContextVar("portacnn_precision", default="float32")


def precision() -> str:
    """What the factors of products are rounded to here before they are multiplied (see
    ``use_precision``)."""
    return _precision.get()


@contextmanager
def use_precision(word: str) -> Iterator[None]:
    """Within it, the products of float32 convolutions and affine maps may be less exact, where a
    device is faster so.

    Args:
        word: what their factors are rounded to before they are multiplied: "float32" leaves them as
            they are, and is what holds everywhere else; "tf32" leaves 10 bits behind the point,
            "bfloat16" 7, "float16" 10 (and numbers up to 65504). "3xtf32" makes two numbers of
            "tf32" out of each and three products out of one: each is off by at most 3 * 2**-22 of
            itself, about as much as sums of "float32" are, on the same units as "tf32". Infinity
            becomes NaN in it. Products are added up in float32 always, and weights and activations
            stay float32. A bias's gradient, taken as a product with ones, may be rounded alike.

    Forward and backward each go by what holds when they run. A device without such units
    (``Backend.precisions``) goes on in float32, and so do ops that no kernel takes (convolution of
    three axes). It holds for the current thread (a context variable).

    Raises:
        ArgumentError: another word.
    """
    token = _precision.set(one_of("precision", word, *PRECISIONS))
    try:
        yield
    finally:
        _precision.reset(token)


@lru_cache(maxsize=1024)
def computed_in(xp: Any, dtype: Any) -> Any:
    """The dtype that ops compute in for arrays of ``dtype``, where that is another; None where it
    is the same.

    float16 and bfloat16 are computed in float32: their sums would lose digits from 2048 (256)
    summands on, and end at 65504. NumPy's arrays of foreign byte order are computed in the
    machine's own.
    """
    native = _in_native_order(dtype)
    if str(native).rpartition(".")[2] in ("float16", "bfloat16"):
        return xp.float32
    return None if native == dtype else native


def _in_native_order(dtype: Any) -> Any:
    return dtype if getattr(dtype, "isnative", True) else dtype.newbyteorder("=")


def _native(array: Array) -> Array:
    """The array itself, or where its bytes are in foreign order (NumPy's may be) a native copy."""
    backend = backend_of(array)
    native = _in_native_order(array.dtype)
    return array if native is array.dtype else backend.xp.astype(array, native)


def _write_back(given: Any, computed: Any) -> None:
    """What an op wrote into copies, into the arrays that they are copies of; arrays, lists of them,
    or None."""
    if isinstance(given, list):
        for one, other in zip(given, computed, strict=True):
            _write_back(one, other)
    elif given is not computed:
        given[...] = backend_of(given).xp.astype(computed, given.dtype)


class Cache(NamedTuple):
    """What a forward kept for its backward, and whose backward that is."""

    op: str
    backward: Callable[..., Any]
    saved: Any
    # library, shape, dtype and device of what the forward gave back: so is its gradient
    result: tuple[Any, ...]
    backend: Backend


class Op:
    """An op's portable pair, callable through the dispatch: ``@op()`` on the forward, then
    ``@name.backward``.

    An op that only writes into its arguments (an optimizer's update) has no backward, and its
    result is handed on as it is.

    Every kernel and every portable op sees float32 or float64 in the machine's byte order only:
    other floats are converted before (``computed_in``). They all run within ``Backend.elsewhere``,
    where NumPy does not warn of infinities and NaN.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        check: Callable[..., None] | None,
        writes: tuple[str, ...] = (),
    ) -> None:
        update_wrapper(self, forward)
        self.name = forward.__name__
        self.forward = forward
        self.check = check
        self.writes = writes
        self.portable_backward: Callable[..., Any] | None = None
        OPS[self.name] = self

    def backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the portable backward ``(dy, saved, **options)``; gives back the dispatching
        ``(dy, cache, **options)``."""
        self.portable_backward = function

        @wraps(function)
        def run(dy: Array, cache: Cache | None, **options: Any) -> Any:
            if cache is None:
                raise StateError(
                    f"nothing was kept; call {self.name} with keep=True", function.__name__
                )
            if cache.op != self.name:
                raise StateError(
                    f"expected the cache of {self.name}, got one of {cache.op}", function.__name__
                )
            if not isinstance(dy, float) and _kind(dy) != cache.result:
                dy = _native(dy)
            if not isinstance(dy, float) and _kind(dy) != cache.result:
                library, shape, dtype, device = cache.result
                raise ArrayError(
                    f"expected a gradient like the output ({library} {dtype} {shape} on {device}), "
                    f"got {describe(dy)}",
                    function.__name__,
                )
            backend = cache.backend
            compute = (
                partial(backend.run, function) if cache.backward is function else cache.backward
            )
            try:
                if backend.enters and (around := backend.elsewhere(cache.result[-1])) is not None:
                    with around:
                        return compute(dy, cache.saved, **options)
                return compute(dy, cache.saved, **options)
            except TypeError:
                check_call(function.__name__, function, dy, cache.saved, **options)
                raise

        return run

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        if self.check is not None:
            try:
                self.check(x, *args, **kwargs)
            except TypeError:
                check_call(self.name, self.forward, x, *args, **kwargs)
                raise
        one = x[0] if isinstance(x, list) else x
        backend = backend_of(one)
        if backend.enters and (around := backend.elsewhere(one.device)) is not None:
            with around:
                return self._run(backend, one, x, args, kwargs)
        return self._run(backend, one, x, args, kwargs)

    def _run(
        self, backend: Backend, one: Array, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if (dtype := computed_in(backend.xp, one.dtype)) is not None:
            return self._converted(backend, one, dtype, (x, *args), kwargs)
        for kernel in self._overrides(backend):
            result, backward = kernel.forward(x, *args, **kwargs), kernel.backward
            if result is not NotImplemented:
                break
        else:
            result, backward = backend.run(self.forward, x, *args, **kwargs), self.portable_backward
        if backward is None:
            return result
        y, saved = result
        return y, None if saved is None else Cache(self.name, backward, saved, _kind(y), backend)

    def _converted(
        self,
        backend: Backend,
        one: Array,
        dtype: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The op computed in ``dtype``. Results of half precision come back in it, those of foreign
        byte order stay native."""
        xp, old = backend.xp, one.dtype

        def change(value: Any, old: Any, new: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)([change(item, old, new) for item in value])
            return xp.astype(value, new) if getattr(value, "dtype", None) == old else value

        bound = signature(self.forward).bind(*args, **kwargs)
        given = dict(bound.arguments)
        bound.arguments.update({name: change(value, old, dtype) for name, value in given.items()})
        x, *others = bound.args
        result = self._run(backend, change(one, old, dtype), x, tuple(others), bound.kwargs)
        for name in self.writes:
            _write_back(given.get(name), bound.arguments.get(name))
        native = _in_native_order(old)
        if native == dtype:
            return result
        if self.portable_backward is None:
            return change(result, dtype, native)
        y, cache = change(result[0], dtype, native), result[1]
        if cache is None:
            return y, None

        def backward(dy: Any, saved: Any, **options: Any) -> Any:
            return change(
                cache.backward(change(dy, native, dtype), saved, **options), dtype, native
            )

        return y, Cache(self.name, backward, cache.saved, _kind(y), backend)

    def prepare(self, x: Array, *args: Any, **kwargs: Any) -> Callable[[Array], Array]:
        """This op for one array after another that are all just like ``x``, keeping nothing: a
        function of the array alone.

        The other arguments stay the same objects, though arrays among them may be written to in
        between. What the function gives back lies in memory that its next call uses again.
        """
        if self.check is not None:
            self.check(x, *args, **kwargs)
        backend = backend_of(x)
        for kernel in self._overrides(backend) if computed_in(backend.xp, x.dtype) is None else ():
            if kernel.prepare is not None:
                function = kernel.prepare(x, *args, **kwargs)
                if function is not NotImplemented:
                    return function
        return lambda x: self(x, *args, **kwargs, keep=False)[0]

    def _overrides(self, backend: Backend) -> Iterator[Kernel]:
        """The kernels that a backend has for this op; the fastest first."""
        choice = kernel_choice()
        if choice == "reference":
            return
        skipping = choice in backend.kernels
        for name, table in backend.kernels.items():
            skipping = skipping and name != choice
            if not skipping and (kernel := table.get(self.name)):
                yield kernel


def check_call(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise TypeError, naming the public function ``name``, if ``function`` cannot be called with
    these arguments. The error that Python raises itself names an inner function."""
    try:
        signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def _kind(array: Array) -> tuple[Any, ...]:
    return backend_of(array).name, tuple(array.shape), array.dtype, array.device


def op(
    check: Callable[..., None] | None = None, writes: tuple[str, ...] = ()
) -> Callable[[Callable[..., Any]], Op]:
    """Make a portable forward an ``Op``.

    Args:
        check: gets the same arguments first, and raises on bad ones.
        writes: the names of the arguments that it writes into, arrays or lists of arrays.
    """
    return lambda forward: Op(forward, check, writes)


OPS: dict[str, Op] = {}
"""Every op by name: what a backend may override."""


def check_arrays(op: str, *, integers: bool = False, **arrays: Array | None) -> None:
    """Refuse mixed libraries, devices and dtypes, and integers where floats belong. None stands for
    "not given".

    Raises:
        ArrayError: naming the op, its argument, and what came.
    """
    first_name, first = None, None
    for name, array in arrays.items():
        if array is None:
            continue
        if first is None:
            first_name, first = name, array
            if not integers and not is_float(backend_of(array).xp, array.dtype):
                raise ArrayError(
                    f"{name} must be floating point, got {describe(array)}; convert it first "
                    "(images: x.astype('float32') / 255)",
                    op,
                )
            continue
        if type(array) is not type(first) and backend_of(array).name != backend_of(first).name:
            problem = "of one library"
        elif array.device != first.device:
            problem = "on one device"
        elif array.dtype != first.dtype:
            same = _in_native_order(array.dtype) == _in_native_order(first.dtype)
            problem = (
                "of one byte order (x.astype('float32') is native)" if same else "of one dtype"
            )
        else:
            continue
        raise ArrayError(
            f"arrays must be {problem}; {first_name} is {describe(first)}, {name} is "
            f"{describe(array)}",
            op,
        )
