"""Complex arrays in ops whose code and kernels are written for real ones.

Notation: N batch, C in-channels, O out-channels, G groups, S/OUT the spatial axes in/out, K the
kernel. A real map acts on the real and the imaginary part of x separately, as on two samples of a
batch. ``samples`` returns them as such: rows 2n and 2n + 1 are the parts of sample n. That is all
that average pooling needs.

A convolution is also linear in its weight W = Wr + i Wi, so y = Wr x + i Wi x. One real convolution
computes the four real products:

    a (2N, 2O, *OUT)  =  conv(samples of x (2N, C, *S), [Wr; Wi] (2O, C/G, *K));      y = a1 + i a2

With groups, the channels of Wr and Wi alternate, group by group. The gradient in PyTorch's
convention is that of the real and imaginary parts, so each step has the gradient of a real map:

    da  =  samples of [dy; -i dy];      dx, [dWr; dWi]  =  conv_backward(da)
"""

from collections.abc import Callable
from math import prod
from typing import Any

from portacnn.ops.dispatch import Op
from portacnn.ops.layout import batch_first, batch_last
from portacnn.runtime import Array, Backend, backend_of


def conj(x: Array) -> Array:
    """Return the complex conjugate."""
    return backend_of(x).xp.conj(x)


def samples(x: Array) -> Array:
    """Return a complex x (N, ...) as real samples (2N, ...), in the backend's memory layout."""
    backend = backend_of(x)
    xp, shape = backend.xp, (2 * x.shape[0], *x.shape[1:])
    if backend.layout == "batch_first":
        return xp.reshape(xp.moveaxis(backend.as_real(x), -1, 1), shape)
    parts = backend.as_real(batch_last(x))  # (..., N, 2)
    return batch_first(xp.reshape(parts, (*shape[1:], shape[0])))


def from_samples(parts: Array) -> Array:
    """Return the complex array (N, ...) of real samples (2N, ...): the inverse of ``samples``."""
    backend = backend_of(parts)
    xp, (n, *shape) = backend.xp, parts.shape
    if backend.layout == "batch_first":
        return backend.as_complex(xp.moveaxis(xp.reshape(parts, (n // 2, 2, *shape)), 1, -1))
    return batch_first(backend.as_complex(xp.reshape(batch_last(parts), (*shape, n // 2, 2))))


def part_by_part(op: Op, backward: Callable[..., Any]) -> None:
    """Let ``op`` take complex arrays (N, ...): a real linear map of one array, each sample apart.

    ``backward`` is the op's dispatching backward function.
    """

    def forward(x: Array, *args: Any, keep: bool) -> tuple[Array, Any]:
        y, cache = op(samples(x), *args, keep=keep)
        return from_samples(y), cache

    def gradient(dy: Array, cache: Any) -> Array:
        return from_samples(backward(samples(dy), cache))

    op.on_complex(forward, gradient)


def product_by_product(op: Op, backward: Callable[..., Any], transposed: bool = False) -> None:
    """Let ``op`` take complex arrays: ``conv``, or ``conv_transpose``, whose weight is (C, O/G,
    *K).

    ``backward`` is the op's dispatching backward function.
    """

    def rows(weight: Array, groups: int) -> tuple[int, int, int]:
        """Return the shape of the weight as a matrix of rows for each set of outputs that stay
        together.
        """
        shape = weight.shape
        if transposed:
            return shape[0], shape[1], prod(shape[2:])
        return groups, shape[0] // groups, prod(shape[1:])

    def forward(
        x: Array, weight: Array, bias: Array | None, windows: Any, groups: int, *, keep: bool
    ) -> tuple[Array, tuple | None]:
        backend = backend_of(x)
        xp, axis = backend.xp, int(transposed)
        parts = xp.moveaxis(
            backend.as_real(xp.reshape(weight, rows(weight, groups))), -1, 1
        )  # (rows, 2, outputs, M)
        stacked = list(weight.shape)
        stacked[axis] *= 2
        a, cache = op(
            samples(x), xp.reshape(parts, tuple(stacked)), None, windows, groups, keep=keep
        )
        y = _joined(backend, a, groups)
        if bias is not None:
            y += xp.reshape(bias, (-1,) + (1,) * (y.ndim - 2))
        return y, (cache, weight, bias is not None, groups) if keep else None

    def gradients(
        dy: Array,
        saved: tuple,
        *,
        need_dx: bool = True,
        need_dweight: bool = True,
        need_dbias: bool = True,
    ) -> tuple[Array | None, Array | None, Array | None]:
        cache, weight, with_bias, groups = saved
        backend = backend_of(dy)
        xp, dx, dweight, dbias = backend.xp, None, None, None
        if with_bias and need_dbias:
            dbias = xp.sum(dy, axis=(0, *range(2, dy.ndim)))
        if need_dx or need_dweight:
            dx, dweight, _ = backward(
                _turned(backend, dy, groups), cache, need_dx=need_dx, need_dweight=need_dweight
            )
        if dx is not None:
            dx = from_samples(dx)
        if dweight is not None:
            first, *others = rows(weight, groups)
            parts = xp.moveaxis(xp.reshape(dweight, (first, 2, *others)), 1, -1)
            dweight = xp.reshape(backend.as_complex(parts), weight.shape)
        return dx, dweight, dbias

    op.on_complex(forward, gradients)


def _joined(backend: Backend, a: Array, groups: int) -> Array:
    """Return y = a1 + i a2 (N, O, *OUT) for the samples a (2N, 2O, *OUT)."""
    xp, (n, o, *out) = backend.xp, a.shape
    a = xp.reshape(a, (n // 2, 2, groups, 2, o // (2 * groups), *out))
    re = a[:, 0, :, 0, ...] - a[:, 1, :, 1, ...]
    im = a[:, 1, :, 0, ...] + a[:, 0, :, 1, ...]  # (N, G, O/G, *OUT)
    last = backend.layout == "batch_last"
    re, im = (batch_last(part) if last else part for part in (re, im))
    parts = xp.empty((*re.shape, 2), dtype=a.dtype, device=a.device)
    parts[..., 0] = re
    parts[..., 1] = im
    y = backend.as_complex(parts)
    return xp.reshape(batch_first(y) if last else y, (n // 2, o // 2, *out))


def _turned(backend: Backend, dy: Array, groups: int) -> Array:
    """Return da = [dy; -i dy] as samples (2N, 2O, *OUT): the adjoint of ``_joined``."""
    xp, (n, o, *out) = backend.xp, dy.shape
    parts = xp.reshape(samples(dy), (n, 2, groups, o // groups, *out))
    re, im = parts[:, 0, ...], parts[:, 1, ...]  # (N, G, O/G, *OUT)
    last = backend.layout == "batch_last"
    re, im = (batch_last(part) if last else part for part in (re, im))
    if last:
        da = xp.empty((groups, 2, o // groups, *out, n, 2), dtype=re.dtype, device=re.device)
        da[:, 0, ..., 0] = re
        da[:, 0, ..., 1] = im
        da[:, 1, ..., 0] = im
        da[:, 1, ..., 1] = -re
        return batch_first(xp.reshape(da, (2 * o, *out, 2 * n)))
    da = xp.empty((n, 2, groups, 2, o // groups, *out), dtype=re.dtype, device=re.device)
    da[:, 0, :, 0, ...] = re
    da[:, 1, :, 0, ...] = im
    da[:, 0, :, 1, ...] = im
    da[:, 1, :, 1, ...] = -re
    return xp.reshape(da, (2 * n, 2 * o, *out))
