"""Affine maps on NumPy, optionally with ReLU: in reused memory, with bias and ReLU applied in
place.

Notation as in ops/_linear.py: N batch, F in-features, O out-features; x.T (F, N) and y.T (O, N) are
contiguous.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from portacnn.backends.numpy.memory import empty, reserve
from portacnn.backends.numpy.pool import clear_where, zeros_for
from portacnn.backends.threads import on_one_blas_thread, products_in_pieces
from portacnn.runtime import Kernel


def _product(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Compute out = a @ b in parallel pieces, cut along its longer side."""
    if out.shape[0] >= out.shape[1]:
        products_in_pieces(
            lambda s: np.matmul(a[s], b, out=out[s]), out.shape[0], a.size * b.shape[1]
        )
    else:
        products_in_pieces(
            lambda s: np.matmul(a, b[:, s], out=out[:, s]), out.shape[1], a.size * b.shape[1]
        )
    return out


def _map(x: np.ndarray, weight: np.ndarray, bias: Any) -> np.ndarray:
    """Return y.T (O, N)."""
    yt = _product(weight, x.T, empty((weight.shape[0], x.shape[0]), x.dtype))
    if bias is not None:
        yt += bias[:, None]
    return yt


def linear(x: np.ndarray, weight: np.ndarray, bias: Any = None, *, keep: bool = True) -> Any:
    return _map(x, weight, bias).T, (x, weight, bias is not None) if keep else None


def linear_backward(
    dy: np.ndarray,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    x, weight, with_bias = saved  # conj() returns a real array itself
    dx = None
    if need_dx:
        dx = _product(weight.conj().T, dy.T, empty((x.shape[1], x.shape[0]), x.dtype)).T
    dweight = _product(dy.T, x.conj(), empty(weight.shape, x.dtype)) if need_dweight else None
    return dx, dweight, dy.sum(axis=0) if with_bias and need_dbias else None


def linear_relu(x: np.ndarray, weight: np.ndarray, bias: Any = None, *, keep: bool = True) -> Any:
    yt = _map(x, weight, bias)
    np.maximum(yt, zeros_for(yt), out=yt)
    return yt.T, (x, weight, bias is not None, yt) if keep else None


def linear_relu_backward(
    dy: np.ndarray,
    saved: Any,
    *,
    need_dx: bool = True,
    need_dweight: bool = True,
    need_dbias: bool = True,
) -> Any:
    *rest, yt = saved
    dz = empty(yt.shape, yt.dtype)
    clear_where(yt <= 0, np.ascontiguousarray(dy.T), dz)
    return linear_backward(
        dz.T,
        rest,
        need_dx=need_dx,
        need_dweight=need_dweight,
        need_dbias=need_dbias,
    )


def prepare_linear(
    x: np.ndarray, weight: np.ndarray, bias: Any = None
) -> Callable[[np.ndarray], np.ndarray]:
    return _prepared(x, weight, bias, relu=False)


def prepare_linear_relu(
    x: np.ndarray, weight: np.ndarray, bias: Any = None
) -> Callable[[np.ndarray], np.ndarray]:
    return _prepared(x, weight, bias, relu=True)


def _prepared(
    x: np.ndarray, weight: np.ndarray, bias: Any, relu: bool
) -> Callable[[np.ndarray], np.ndarray]:
    yt = reserve((weight.shape[0], x.shape[0]), x.dtype)
    y, column = yt.T, None if bias is None else bias[:, None]
    matmul, add, maximum, zeros = np.matmul, np.add, np.maximum, zeros_for(yt)

    def run(x: np.ndarray) -> np.ndarray:
        on_one_blas_thread(matmul, weight, x.T, out=yt)
        if column is not None:
            add(yt, column, out=yt)
        if relu:
            maximum(yt, zeros, out=yt)
        return y

    return run


KERNELS = {
    "linear": Kernel(linear, linear_backward, prepare_linear, complex=True),
    "linear_relu": Kernel(linear_relu, linear_relu_backward, prepare_linear_relu),
}
