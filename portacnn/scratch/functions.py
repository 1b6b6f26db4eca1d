"""The tutorials' functions (``common/functions.py``, ``common/gradient.py``, d2l.ai's ``corr2d``)
on arrays of any backend.

The tutorials' code mixes dtypes as NumPy allows: float32 images, float64 weights, integer labels
and kernels. The ops do not accept that; here ``real`` and ``like`` convert first.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from portacnn import gradient_check, ops
from portacnn.errors import ArrayError, PortacnnError, ShapeError
from portacnn.ops.dispatch import check_arrays, computed_in
from portacnn.ops.windows import Padding
from portacnn.runtime import Array, backend_of, describe, dtype_name, is_float, where

_TINY = 1e-7  # the book's guard of a logarithm
_STEPS = {"float64": 1e-4, "float32": 1e-2}  # float32 needs a larger step

# --- dtypes ---------------------------------------------------------------------------------------


def real(x: Array, dtype: str = "float64") -> Array:
    """Return x if it is floating point; convert whole numbers and booleans to ``dtype``, as NumPy
    does."""
    backend = backend_of(x)
    if backend.xp.isdtype(x.dtype, ("bool", "integral")):
        return backend.xp.astype(x, backend.dtype(dtype))
    return x


def like(x: Array, other: Array) -> Array:
    """Return x in the dtype of another array of its library, if that is floating point; else x
    itself."""
    source = backend_of(x)
    if (
        source.name != backend_of(other).name
        or x.dtype == other.dtype
        or not is_float(source.xp, other.dtype)
    ):
        return x
    x = real(x)
    return source.xp.astype(x, other.dtype) if is_float(source.xp, x.dtype) else x


# --- activations and losses -----------------------------------------------------------------------


def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)) for any x, without overflow. Integers become float64.

    >>> import numpy as np
    >>> sigmoid(np.array([0.0, 1000.0])).tolist()
    [0.5, 1.0]
    """
    return ops.sigmoid(real(x), keep=False)[0]


def relu(x: Array) -> Array:
    """Return max(x, 0) in a new array. Integers become float64."""
    return ops.relu(real(x), keep=False)[0]


def softmax(x: Array) -> Array:
    """Return exp(x) / sum(exp(x)) along the last axis, for x (N, C), or (C,) for one sample.

    Integers become float64.
    """
    return ops.softmax(real(x), -1, keep=False)[0]


def cross_entropy_error(y: Array, t: Array) -> Array:
    """Return the mean of -sum(t * log(y + 1e-7)) over a batch, 0-dimensional: the book's formula.

    The book uses only the class of the largest t. Here soft labels have their full effect. A label
    outside the classes makes the result NaN.

    Args:
        y: probabilities (N, C), or (C,) for one sample, as ``softmax`` returns; not logits.
        t: class numbers (N,) or (N, 1), or a distribution (one-hot) shaped as y.

    Raises:
        ShapeError: if the labels do not fit y. ArrayError: if t is of another library or device.
    """
    y = real(y)
    xp = backend_of(y).xp
    if y.ndim == 1:
        y, t = xp.reshape(y, (1, -1)), backend_of(t).xp.reshape(t, (1, -1))
    check_arrays("cross_entropy_error", y=y, t=like(t, y))
    dtype, t = y.dtype, target(t, y)
    with where(y):
        y = xp.astype(y, computed_in(xp, dtype) or dtype, copy=False)
        if t.ndim == 2:
            p, known = like(t, y), True
        else:
            classes = xp.arange(y.shape[1], dtype=xp.int64, device=y.device)
            labels = xp.astype(t, xp.int64)
            hits = (labels[:, None] == classes) & (xp.astype(labels, t.dtype) == t)[:, None]
            p, known = xp.astype(hits, y.dtype), xp.any(hits, axis=1)
        losses = -xp.sum(p * xp.log(y + _TINY), axis=1)
        loss = (
            xp.sum(losses if known is True else xp.where(known, losses, float("nan"))) / y.shape[0]
        )
        return loss if dtype == loss.dtype else xp.astype(loss, dtype)


def target(t: Array, y: Array) -> Array:
    """Convert labels in any of the book's forms, for outputs y (N, C), to (N,) or the shape of y.

    Raises:
        ShapeError: if they match neither the rows of y nor its elements.
    """
    xp = backend_of(t).xp
    if y.ndim == 2 and prod(t.shape) == prod(y.shape):
        return xp.reshape(t, tuple(y.shape))
    if y.ndim == 2 and prod(t.shape) == y.shape[0]:
        return xp.reshape(t, (y.shape[0],))
    raise ShapeError(
        "expected labels (N,) or one-hot (N, C) for outputs (N, C), got "
        f"{describe(t)} for {describe(y)}"
    )


# --- gradients by differences ---------------------------------------------------------------------


def number(value: Any) -> float:
    """Return a loss as a Python number, from a number or an array with one element on any
    device."""
    return float(
        value if isinstance(value, int | float) else backend_of(value).to_host(value).item()
    )


def numerical_gradient(f: Callable[[Array], Any], x: Array, h: float | None = None) -> Array:
    """Return the gradient of f at x by central differences, (f(x + h) - f(x - h)) / 2h for each
    element.

    Each element of x is changed in place and restored. So f may use its argument, or the same array
    by another reference (``lambda W: net.loss(x, t)``).

    Args:
        f: takes x and returns one number.
        x: floating point. The book's rounds x + h to an integer if x holds integers, which is an
            error here.
        h: the step; by default 1e-4 for float64 as in the book, 1e-2 for float32, which leaves two
            or three digits.

    Returns:
        An array like x.

    Raises:
        ArrayError: if x is not floating point.
    """
    if not is_float(backend_of(x).xp, x.dtype):
        raise ArrayError(
            f"expected floating point, got {describe(x)}; write 3.0 for 3, or x.astype('float64')",
            "numerical_gradient",
        )
    if h is None:
        h = _STEPS.get(dtype_name(x), 1e-1)
    return gradient_check.numerical_gradient(lambda: number(f(x)), x, h)


# --- one image, one kernel ------------------------------------------------------------------------


def corr2d(X: Array, K: Array) -> Array:
    """Return the cross-correlation of "Dive into Deep Learning" (d2l.ai): Y[i, j] = sum(X[i : i +
    h, j : j + w] * K).

    Args:
        X: (H, W). ``K``: (h, w).

    Returns:
        (H - h + 1, W - w + 1), in the wider dtype of the two; float64 if both are integers.
    """
    return _correlate("corr2d", 2, X, K, 0, 1)


def convolution_1d(x: Array, kernel: Array, padding: Padding = 0, stride: int = 1) -> Array:
    """Slide a kernel along a signal: y[i] = sum(x[i*stride : i*stride + K] * kernel).

    As in most tutorials, and in every CNN, the kernel is not flipped: it is a cross-correlation.
    The convolution of mathematics (``numpy.convolve``) is ``convolution_1d(x,
    numpy.flip(kernel))``.

        >>> import numpy as np
        >>> convolution_1d(np.array([1.0, 2.0, 4.0]), np.array([1.0, -1.0])).tolist()
        [-1.0, -2.0]

    Args:
        x: (L,). ``kernel``: (K,).
        padding: number of zeros at both ends; also "same" or "valid".
        stride: the step.

    Returns:
        ((L + 2*padding - K) // stride + 1,), in the wider dtype of the two; float64 if both are
        integers.
    """
    return _correlate("convolution_1d", 1, x, kernel, padding, stride)


def convolution_2d(
    x: Array, kernel: Array, padding: Padding = 0, stride: int | Sequence[int] = 1
) -> Array:
    """Slide a kernel over one image of one channel and sum the products, as ``corr2d``.

    The kernel is not flipped. The convolution of mathematics (``scipy.signal.convolve2d``) is
    ``convolution_2d(x, numpy.flip(kernel))``. For channels and batches use ``Convolution`` or
    ``portacnn.ops.conv2d``.

    Args:
        x: (H, W). ``kernel``: (KH, KW).
        padding: number of zeros on every side, or (vertical, horizontal); also "same" or "valid".
        stride: a number or (vertical, horizontal).

    Returns:
        (OH, OW), in the wider dtype of the two; float64 if both are integers.
    """
    return _correlate("convolution_2d", 2, x, kernel, padding, stride)


def _correlate(
    name: str, axes: int, x: Array, kernel: Array, padding: Padding, stride: int | Sequence[int]
) -> Array:
    for what, array in (("input", x), ("kernel", kernel)):
        backend_of(array)  # raises ArrayError for a list
        if array.ndim != axes:
            raise ShapeError(f"{what}: expected {axes} axes, got {describe(array)}", name)
    x, kernel = _wide(x, kernel), _wide(kernel, x)
    conv = ops.conv1d if axes == 1 else ops.conv2d
    try:
        y, _ = conv(
            x[None, None, ...], kernel[None, None, ...], stride=stride, padding=padding, keep=False
        )
    except PortacnnError as error:
        raise error.at(name, over=True)
    return backend_of(y).xp.reshape(y, tuple(y.shape[2:]))


def _wide(a: Array, b: Array) -> Array:
    """Return a in the wider of the floating dtypes of a and b."""
    xp = backend_of(a).xp
    if not is_float(xp, a.dtype):
        return real(like(a, b))
    if backend_of(b).name != backend_of(a).name or not is_float(xp, b.dtype):
        return a
    return xp.astype(a, xp.result_type(a.dtype, b.dtype))
