"""How an op finds the code that computes it: its portable pair, or the kernels of a backend.

An op is a pair of functions. The forward function takes arrays and plain values and returns
``(result, saved)``. ``saved`` holds what the backward function needs; it is None with
``keep=False``. The backward function takes the gradient of the result and ``saved``. A backend
overrides an op with a ``Kernel(forward, backward)`` of the same signatures, under the op's name in
one of its kernel sets. The forward function of a kernel may decline a case by returning
``NotImplemented``. Then the next kernel set is tried, and the portable pair last. ``Cache`` stores
``saved`` together with the backward function of the same maker.
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
from portacnn.runtime import Array, Backend, Kernel, backend_of, describe, is_float, part_dtype

VARIABLE = "PORTACNN_KERNELS"
_CHOICES = ("auto", "numba", "native", "reference")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16", "3xtf32")


def _checked(choice: str, source: str) -> str:
    """Return ``choice`` if it is a kernel set that can be used here. Raises ArgumentError.
    ``source`` is named in the message.
    """
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
    """Return the kernel set in use here, or "auto" (see ``use_kernels``). Raises ArgumentError if
    ``PORTACNN_KERNELS`` is invalid.
    """
    return _choice.get() or _from_environment()


@contextmanager
def use_kernels(choice: str) -> Iterator[None]:
    """Select the kernel set for the ops inside a ``with`` block, as ``PORTACNN_KERNELS`` does for a
    process.

    The choice is a context variable, so it applies to the current thread only.

    Args:
        choice: the kernel set to try first. "numba": kernels that numba compiles for NumPy arrays.
            "native": fast functions of the array library itself. "reference": the portable ops
            only. A case that a set declines goes to the next set in this order. "auto" starts with
            the backend's fastest set; so does the name of a set that the backend lacks.

    Raises:
        ArgumentError: if the choice is unknown, or "numba" without numba installed.

    Example:
        >>> with ops.use_kernels("reference"):
        ...     y, cache = ops.relu(np.array([-1.0, 2.0]))
        >>> y
        array([0., 2.])
    """
    token = _choice.set(_checked(choice, "use_kernels(...)"))
    try:
        yield
    finally:
        _choice.reset(token)


_precision: ContextVar[str] = ContextVar("portacnn_precision", default="float32")


def precision() -> str:
    """Return the precision to which the factors of products are rounded here (see
    ``use_precision``).
    """
    return _precision.get()


@contextmanager
def use_precision(word: str) -> Iterator[None]:
    """Allow faster, less exact products of float32 in the convolutions and affine maps of a
    ``with`` block.

    Args:
        word: the precision to which factors are rounded before they are multiplied. "float32" (the
            default) rounds nothing. "tf32" keeps 10 fraction bits, "bfloat16" 7, and "float16" 10
            (up to 65504). "3xtf32" splits each factor into two tf32 values and computes three
            products on the tf32 units. Each product then has a relative error of at most 3 *
            2**-22, about that of a float32 sum; infinity becomes NaN. Products are always
            accumulated in float32, and weights and activations stay float32. The gradient of a bias
            may be rounded too, because some kernels compute it as a product with ones.

    The forward and the backward pass each use the precision that is set when they run. A device
    without such units (``Backend.precisions``) computes in float32, and so do ops without a kernel
    for it (convolution over three axes). The setting is a context variable, so it applies to the
    current thread only.

    Raises:
        ArgumentError: if the word is not one of these.

    Example:
        >>> with ops.use_precision("tf32"):
        ...     y, cache = ops.linear(np.ones((1, 2)), np.ones((1, 2)))
        >>> y
        array([[2.]])
    """
    token = _precision.set(one_of("precision", word, *PRECISIONS))
    try:
        yield
    finally:
        _precision.reset(token)


@lru_cache(maxsize=1024)
def computed_in(xp: Any, dtype: Any) -> Any:
    """Return the dtype that ops compute in for arrays of ``dtype``, or None if it is the same.

    float16 and bfloat16 are computed in float32. Their sums would lose precision from 2048 (256)
    summands on, and float16 overflows at 65504. NumPy arrays of foreign byte order are computed in
    native order. Complex arrays in native order are computed by their real and imaginary parts, in
    the dtype of those.
    """
    native = _in_native_order(dtype)
    if str(native).rpartition(".")[2] in ("float16", "bfloat16"):
        return xp.float32
    return part_dtype(xp, dtype) if native == dtype else native


def _in_native_order(dtype: Any) -> Any:
    return dtype if getattr(dtype, "isnative", True) else dtype.newbyteorder("=")


def _native(array: Array) -> Array:
    """Return the array itself, or a copy in native byte order if its bytes are in foreign order
    (NumPy).
    """
    backend = backend_of(array)
    native = _in_native_order(array.dtype)
    return array if native is array.dtype else backend.xp.astype(array, native)


def _write_back(given: Any, computed: Any) -> None:
    """Copy what an op wrote into converted copies back to the arrays given: arrays, lists of
    arrays, or None.
    """
    if isinstance(given, list):
        for one, other in zip(given, computed, strict=True):
            _write_back(one, other)
    elif given is not computed:
        given[...] = backend_of(given).xp.astype(computed, given.dtype)


class Cache(NamedTuple):
    """What a forward pass stored for its backward pass, and the backward function that reads it.

    >>> y, cache = ops.relu(np.array([-1.0, 2.0]))
    >>> cache.op
    'relu'
    """

    op: str
    backward: Callable[..., Any]
    saved: Any
    # library, shape, dtype and device of the result, which its gradient must share
    result: tuple[Any, ...]
    backend: Backend


def no_cache(given: Any, forward: str, where: str) -> StateError:
    """Return the error to raise where a backward function was given something else than a cache of
    ``forward``."""
    what = "None" if given is None else f"a {type(given).__name__}"
    return StateError(f"expected a cache, got {what}; call {forward} with keep=True", where)


class Op:
    """An op's portable pair, called through the dispatch: ``@op()`` on the forward function, then
    ``@name.backward``.

    An op that only writes into its arguments, such as an optimizer's update, has no backward
    function, and its result is returned unchanged.

    Kernels and portable ops receive only float32 or float64 in native byte order; other floats are
    converted first (``computed_in``). All run inside ``Backend.elsewhere``, in which NumPy does not
    warn of infinity and NaN.

    A linear op also takes complex arrays (``on_complex``). Its kernels see those only if they say
    so (``Kernel.complex``). Every other op refuses them.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        check: Callable[..., None] | None,
        writes: tuple[str, ...] = (),
        as_written: Callable[[], bool] | None = None,
    ) -> None:
        update_wrapper(self, forward)
        self.name = forward.__name__
        self.forward = forward
        self.check = check
        self.writes = writes
        self.as_written = as_written
        self.portable_backward: Callable[..., Any] | None = None
        self._backward_as_written: Callable[..., Any] | None = None
        self.complex_pair: Kernel | None = None
        OPS[self.name] = self

    def on_complex(
        self, forward: Callable[..., Any], backward: Callable[..., Any] | None = None
    ) -> None:
        """Register the portable functions for complex arrays, with the signatures of the real ones.

        Gradients are in PyTorch's convention: dx = dL/d(real x) + i dL/d(imaginary x) for a real L.
        For a linear map A the gradient is then its adjoint (conjugate transpose): dx = A^H dy.
        """
        self.complex_pair = Kernel(forward, backward)

    def backward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Register the portable backward function ``(dy, saved, **options)``. Returns the
        dispatching ``(dy, cache, **options)``.
        """
        self.portable_backward = function
        # another object, which ``run`` below does not take for the function to compile
        self._backward_as_written = lambda dy, saved, **options: function(dy, saved, **options)

        @wraps(function)
        def run(dy: Array, cache: Cache | None, **options: Any) -> Any:
            if type(cache) is not Cache:
                raise no_cache(cache, self.name, function.__name__)
            if cache.backend.wraps and cache.backend.is_own(dy):
                backend = cache.backend
                return backend.given_back(run(backend.taken(dy), cache, **options))
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
        if backend.wraps and backend.is_own(one):
            return self._of_own(backend, x, *args, **kwargs)
        if backend.enters and (around := backend.elsewhere(one.device)) is not None:
            with around:
                return self._run(backend, one, x, args, kwargs)
        return self._run(backend, one, x, args, kwargs)

    def _run(
        self, backend: Backend, one: Array, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if (dtype := computed_in(backend.xp, one.dtype)) is not None:
            if part_dtype(backend.xp, one.dtype) is dtype:
                return self._on_complex(backend, one, (x, *args), kwargs)
            return self._converted(backend, one, dtype, (x, *args), kwargs)
        if self.as_written is not None and self.as_written():
            result, backward = self.forward(x, *args, **kwargs), self._backward_as_written
            return self._with_cache(backend, result, backward)
        for kernel in self._overrides(backend):
            result, backward = kernel.forward(x, *args, **kwargs), kernel.backward
            if result is not NotImplemented:
                break
        else:
            result, backward = backend.run(self.forward, x, *args, **kwargs), self.portable_backward
        return self._with_cache(backend, result, backward)

    def _with_cache(
        self, backend: Backend, result: Any, backward: Callable[..., Any] | None
    ) -> Any:
        """Return what the op returns for what its forward function returned."""
        if backward is None:
            return result
        y, saved = result
        return y, None if saved is None else Cache(self.name, backward, saved, _kind(y), backend)

    def _on_complex(
        self, backend: Backend, one: Array, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the op on complex arrays in native byte order."""
        if self.complex_pair is None:
            raise not_complex(one, self.name)
        for kernel in self._overrides(backend):
            if kernel.complex and (result := kernel.forward(*args, **kwargs)) is not NotImplemented:
                backward = kernel.backward
                break
        else:
            forward, backward, *_ = self.complex_pair
            result = backend.run(forward, *args, **kwargs)
            backward = backward and partial(backend.run, backward)
        return self._with_cache(backend, result, backward)

    def _of_own(self, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        """Run the op on the library's own arrays, which this backend wraps."""
        for name, given in signature(self.forward).bind(*args, **kwargs).arguments.items():
            if name in self.writes and given is not None:
                raise ArrayError(
                    f"{name} is written to, but {backend.name}'s arrays are immutable; pass "
                    f"resolve({backend.name!r}).receive({name})",
                    self.name,
                )
        args, kwargs = backend.taken(args), backend.taken(kwargs)
        result = self(*args, **kwargs)
        if self.portable_backward is None:
            return backend.given_back(result)
        y, cache = result
        return backend.given_back(y), cache

    def _converted(
        self,
        backend: Backend,
        one: Array,
        dtype: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the op in ``dtype``. Results of half precision are converted back; those of foreign
        byte order stay native.
        """
        xp, old = backend.xp, one.dtype

        def change(value: Any, old: Any, new: Any) -> Any:
            if isinstance(value, list | tuple):
                items = [change(item, old, new) for item in value]
                make = getattr(type(value), "_make", type(value))  # named tuples have it
                return make(items)
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

    def prepare(self, x: Any, *args: Any, **kwargs: Any) -> Callable[[Any], Array]:
        """Return a function that runs this op, without a cache, on arrays just like ``x``: one
        array, or a list of arrays if the op takes a list.

        The other arguments stay the same objects; arrays among them may be written to between
        calls. The result of a call lies in memory that the next call overwrites.
        """
        if self.check is not None:
            self.check(x, *args, **kwargs)
        one = x[0] if isinstance(x, list) else x
        backend = backend_of(one)
        native = computed_in(backend.xp, one.dtype) is None
        for kernel in self._overrides(backend) if native else ():
            if kernel.prepare is not None:
                function = kernel.prepare(x, *args, **kwargs)
                if function is not NotImplemented:
                    return function
        if self.portable_backward is None:
            return lambda x: self(x, *args, **kwargs)
        return lambda x: self(x, *args, **kwargs, keep=False)[0]

    def _overrides(self, backend: Backend) -> Iterator[Kernel]:
        """Yield the backend's kernels for this op, the fastest first."""
        choice = kernel_choice()
        if choice == "reference":
            return
        skipping = choice in backend.kernels
        for name, table in backend.kernels.items():
            skipping = skipping and name != choice
            if not skipping and (kernel := table.get(self.name)):
                yield kernel


def check_call(name: str, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Raise TypeError, naming the public function ``name``, if ``function`` cannot be called with
    these arguments. The error that Python raises itself names an inner function."""
    try:
        signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None


def _kind(array: Array) -> tuple[Any, ...]:
    return backend_of(array).name, tuple(array.shape), array.dtype, array.device


def op(
    check: Callable[..., None] | None = None,
    writes: tuple[str, ...] = (),
    as_written: Callable[[], bool] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Make a portable forward function an ``Op``.

    Args:
        check: is called with the same arguments first, and raises if they are invalid.
        writes: the names of the arguments that the op writes into: arrays or lists of arrays.
        as_written: whether the portable pair must run now as it is: no kernel, no compiled form.
    """
    return lambda forward: Op(forward, check, writes, as_written)


OPS: dict[str, Op] = {}
"""Every op by name: what a backend may override."""


_ALL_OR_NONE = "; make all complex, or all real: the parameters of layers are real"


def not_complex(array: Array, where: str, name: str = "x") -> ArrayError:
    """Return the error to raise where a complex array was given to something that computes with
    real numbers only."""
    return ArrayError(
        f"{name} must be real, got {describe(array)}. Only the linear ops of portacnn.ops "
        "(convolution, linear, average pooling, pad, unfold) take complex arrays; give others "
        "xp.real(x) and xp.imag(x) as two channels",
        where,
    )


def check_arrays(
    op: str, *, integers: bool = False, linear: bool = False, **arrays: Array | None
) -> None:
    """Raise ArrayError for mixed libraries, devices or dtypes, and for integers instead of floats.

    Arguments that are None are skipped. The message names the op, the argument and what was
    received. ``integers``: the first may also be an integer array; ``linear``: a complex one.
    """
    first_name, first = None, None
    for name, array in arrays.items():
        if array is None:
            continue
        if first is None:
            first_name, first = name, array
            xp = backend_of(array).xp
            if is_float(xp, array.dtype) or (linear and part_dtype(xp, array.dtype) is not None):
                continue
            if xp.isdtype(array.dtype, "complex floating"):
                raise not_complex(array, op, name)
            if not integers:
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
        kinds = {part_dtype(backend_of(one).xp, one.dtype) is None for one in (first, array)}
        hint = _ALL_OR_NONE if len(kinds) > 1 else ""
        raise ArrayError(
            f"arrays must be {problem}; {first_name} is {describe(first)}, {name} is "
            f"{describe(array)}{hint}",
            op,
        )
