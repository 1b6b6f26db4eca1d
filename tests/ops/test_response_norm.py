"""Local response normalization: by its definition, numerically, against PyTorch."""

import math

import numpy as np
import pytest

from portacnn import ops
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    normal,
    untouched,
)
from support.matrix import Here, needs
from support.norm_cases import TOLERANCE, indices

# --- local response norm --------------------------------------------------------------------------


def response_norm(x, size, alpha, beta, k):
    y = np.zeros(x.shape)
    for n, c, *at in indices(x.shape):
        low, high = max(0, c - size // 2), min(x.shape[1] - 1, c + (size - 1) // 2)
        total = math.fsum(float(x[(n, j, *at)]) ** 2 for j in range(low, high + 1))
        y[(n, c, *at)] = x[(n, c, *at)] / (k + alpha / size * total) ** beta
    return y


@needs("torch")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 9, 20])
@pytest.mark.parametrize("shape", [(2, 5, 2, 3), (3, 1, 4), (1, 7, 2, 1, 2)])
def test_response_norm(backend: Here, shape: tuple, size: int, dtype: str):
    import torch

    x, dy = 2 * normal(*shape), normal(*shape, seed=1)
    options = {"alpha": 0.5, "beta": 0.7, "k": 1.3}
    leaf = torch.tensor(x, requires_grad=True)
    torch.nn.functional.local_response_norm(leaf, size, **options).backward(torch.tensor(dy))
    for layout in LAYOUTS:
        xs, dys = laid_out(backend, x, dtype, layout), laid_out(backend, dy, dtype, layout)
        with untouched(backend, xs, dys):
            y, cache = ops.local_response_norm(xs, size, **options)
            dx = ops.local_response_norm_backward(dys, cache)
        agree(backend, y, response_norm(x, size, **options), xs, TOLERANCE[dtype])
        agree(backend, dx, leaf.grad.numpy(), xs, TOLERANCE[dtype])


def test_response_norms_gradient(backend: Here):
    host = normal(2, 5, 2)
    for size in (3, 4):
        dy = backend.array(normal(2, 5, 2, seed=2))
        _, cache = ops.local_response_norm(backend.array(host), size, alpha=0.9)
        gradient_agrees(
            backend,
            ops.local_response_norm_backward(dy, cache),
            lambda x, size=size, dy=dy: backend.xp.sum(
                ops.local_response_norm(x, size, alpha=0.9)[0] * dy
            ),
            host,
        )


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2)])
def test_response_norm_of_nothing(backend: Here, shape: tuple):
    x = backend.array(np.zeros(shape))
    y, cache = ops.local_response_norm(x, 3)
    agree(backend, y, np.zeros(shape), x)
    agree(backend, ops.local_response_norm_backward(y, cache), np.zeros(shape), x)
