"""How an op finds the code that computes it: the portable pair written here, or a backend's own pair.

An op is a pair of functions. The forward takes arrays and plain values and gives back ``(result, saved)``, where ``saved``
is whatever its backward needs, or None when it was told not to keep anything. The backward takes the gradient of the
result and ``saved``. A backend overrides an op by putting a ``Kernel(forward, backward)`` of the same signatures under the
op's name into its table. Its forward may decline a case by returning ``NotImplemented``: then the portable pair runs. What
was saved travels in a ``Cache`` that names its maker, so each backward gets what its own forward kept.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, update_wrapper, wraps
from typing import Any, NamedTuple

from portacnn.arguments import one_of
from portacnn.errors import ArgumentError, ArrayError, StateError
from portacnn.runtime import Array, Backend, Kernel, backend_of, describe, is_float

VARIABLE = "PORTACNN_KERNELS"
_CHOICES = ("auto", "numpy", "reference")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "3xtf32")


def _checked(choice: str, source: str) -> str:
    if choice not in _CHOICES:
        raise ArgumentError(f"{source} must be one of {', '.join(_CHOICES)}; got {choice!r}")
    return choice


_choice: ContextVar[str | None] = ContextVar("portacnn_kernels", default=None)


@cache
def _from_environment() -> str:
    return _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)


def kernel_choice() -> str:
    """What is in force here: "auto", "numpy" or "reference" (see ``use_kernels``). Raises ArgumentError for another word."""
    return _choice.get() or _from_environment()


@contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Within ``with use_kernels("reference"):`` only the portable ops run, as under ``PORTACNN_KERNELS=reference``.

    Args:
        choice: "reference"; "numpy" for what a backend's own library does, without kernels that another one compiles
            (numba's on the CPU); "auto" for the fastest there are.

    It holds for the current thread (a context variable).
    """
    token = _choice.set(_checked(choice, "use_kernels(...)"))
    try:
        yield
    finally:
        _choice.reset(token)


_precision: ContextVar[str] = ContextVar("portacnn_precision", default="float32")


def precision() -> str:
    """What the factors of products are rounded to here before they are multiplied (see ``use_precision``)."""
    return _precision.get()


@contextmanager
def use_precision(word: str) -> Iterator[None]:
    """Within it, the products of float32 convolutions and affine maps may be less exact, where a device is faster so.

    Args:
        word: what their factors are rounded to before they are multiplied: "float32" leaves them as they are, and is what
            holds everywhere else; "tf32" leaves 10 bits behind the point, "bfloat16" 7, "float16" 10 (and numbers up to 65504).
            "3xtf32" makes two numbers of "tf32" out of each and three products out of one: each is off by at most 3 * 2**-22
            of itself, about as much as sums of "float32" are, on the same units as "tf32". Infinity becomes NaN in it.
            Products are added up in float32 always, and weights and activations stay float32. A bias's gradient, taken as a
            product with ones, may be rounded alike.

    Forward and backward each go by what holds when they run. A device without such units (``Backend.precisions``) goes on in
    float32, and so do ops that no kernel takes (convolution of three axes). It holds for the current thread (a context variable).

    Raises:
        ArgumentError: another word.
    """
    token = _precision.set(one_of("precision", word, *PRECISIONS))
    try:
        yield
    finally:
        _precision.reset(token)


class Cache(NamedTuple):
    """What a forward kept for its backward, and whose backward that is."""

    op: str
    backward: Callable[..., Any]
    saved: Any
    result: tuple[Any, ...]  # library, shape, dtype and device of what the forward gave back: so is its gradient
    backend: Backend


class Op:
    """An op's portable pair, callable through the dispatch: ``@op()`` on the forward, then ``@name.backward``.

    An op that only writes into its arguments (an optimizer's update) has no backward, and its result is handed on as it is.
    """

    def __init__(self, forward: Callable[..., Any], check: Callable[..., None] | None) -> None:
        update_wrapper(self, forward)
        self.name = forward.__name__
        self.forward = forward
        self.check = check
        self.portable_backward: Callable[..., Any] | None = None
        OPS[self.name] = self

    def backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the portable backward ``(dy, saved, **options)``; gives back the dispatching ``(dy, cache, **options)``."""
        self.portable_backward = function

        @wraps(function)
        def run(dy: Array, cache: Cache | None, **options: Any) -> Any:
            if cache is None:
                raise StateError(f"nothing was kept; call {self.name} with keep=True", function.__name__)
            if cache.op != self.name:
                raise StateError(f"expected the cache of {self.name}, got one of {cache.op}", function.__name__)
            if not isinstance(dy, float) and _kind(dy) != cache.result:
                library, shape, dtype, device = cache.result
                raise ArrayError(
                    f"expected a gradient like the output ({library} {dtype} {shape} on {device}), got {describe(dy)}",
                    function.__name__,
                )
            if cache.backend.has_current_device and (there := cache.backend.elsewhere(cache.result[-1])) is not None:
                with there:
                    return cache.backward(dy, cache.saved, **options)
            return cache.backward(dy, cache.saved, **options)

        return run

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Any:
        if self.check is not None:
            self.check(x, *args, **kwargs)
        one = x[0] if isinstance(x, list) else x
        backend = backend_of(one)
        if backend.has_current_device and (there := backend.elsewhere(one.device)) is not None:
            with there:
                return self(x, *args, **kwargs)
        for kernel in self._overrides(backend):
            result, backward = kernel.forward(x, *args, **kwargs), kernel.backward
            if result is not NotImplemented:
                break
        else:
            result, backward = self.forward(x, *args, **kwargs), self.portable_backward
        if backward is None:
            return result
        y, saved = result
        return y, None if saved is None else Cache(self.name, backward, saved, _kind(y), backend)

    def prepare(self, x: Array, *args: Any, **kwargs: Any) -> Callable[[Array], Array]:
        """This op for one array after another that are all just like ``x``, keeping nothing: a function of the array alone.

        The other arguments stay the same objects, though arrays among them may be written to in between. What the function
        gives back lies in memory that its next call uses again.
        """
        if self.check is not None:
            self.check(x, *args, **kwargs)
        for kernel in self._overrides(backend_of(x)):
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
        if choice == "auto" and (kernel := backend.compiled.get(self.name)):
            yield kernel
        if kernel := backend.kernels.get(self.name):
            yield kernel


def _kind(array: Array) -> tuple[Any, ...]:
    return backend_of(array).name, tuple(array.shape), array.dtype, array.device


def op(check: Callable[..., None] | None = None) -> Callable[[Callable[..., Any]], Op]:
    """Make a portable forward an ``Op``. ``check`` gets the same arguments first, and raises on bad ones."""
    return lambda forward: Op(forward, check)


OPS: dict[str, Op] = {}
"""Every op by name: what a backend may override."""


def check_arrays(op: str, *, integers: bool = False, **arrays: Array | None) -> None:
    """Refuse mixed libraries, devices and dtypes, and integers where floats belong. None stands for "not given".

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
            problem = "of one dtype"
        else:
            continue
        raise ArrayError(
            f"arrays must be {problem}; {first_name} is {describe(first)}, {name} is {describe(array)}", op
        )
