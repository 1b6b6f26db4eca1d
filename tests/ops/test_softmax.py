"""Softmax and its logarithm: by hand, numerically, against PyTorch."""

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

# --- softmax --------------------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(backend: Here, dtype: str, name: str, dim: int):
    import torch

    host, up = 5 * normal(3, 4, 5), normal(3, 4, 5, seed=1)
    host[0, 0, 0], host[1, 2, 3], host[2, 3] = 1e4, -1e4, 1e4
    leaf = torch.tensor(host, requires_grad=True)
    expected = getattr(torch, name)(leaf, dim=dim)
    expected.backward(torch.tensor(up))
    by_hand = np.moveaxis(np.zeros(host.shape), dim, -1)
    rows = np.moveaxis(host, dim, -1)
    for at in np.ndindex(rows.shape[:-1]):
        top = max(rows[at])
        total = math.fsum(math.exp(v - top) for v in rows[at])
        logs = [v - top - math.log(total) for v in rows[at]]
        by_hand[at] = [math.exp(v) for v in logs] if name == "softmax" else logs
    for layout in LAYOUTS:
        x, dy = laid_out(backend, host, dtype, layout), laid_out(backend, up, dtype, layout)
        with untouched(backend, x, dy):
            y, cache = getattr(ops, name)(x, dim)
            dx = getattr(ops, name + "_backward")(dy, cache)
        agree(backend, y, np.moveaxis(by_hand, -1, dim), x)
        agree(backend, dx, leaf.grad.numpy(), x)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_gradient(backend: Here, name: str):
    host, dy = normal(3, 4, 2), backend.array(normal(3, 4, 2, seed=1))
    op = getattr(ops, name)
    for dim in (0, 1):
        _, cache = op(backend.array(host), dim=dim)
        dx = getattr(ops, name + "_backward")(dy, cache)
        gradient_agrees(
            backend, dx, lambda x, dim=dim: backend.xp.sum(op(x, dim=dim, keep=False)[0] * dy), host
        )


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 1)])
def test_softmax_of_few(backend: Here, name: str, shape: tuple):
    x = backend.array(np.full(shape, 7.0))
    y, cache = getattr(ops, name)(x, 1)
    agree(backend, y, np.full(shape, 1.0 if name == "softmax" else 0.0), x)
    agree(backend, getattr(ops, name + "_backward")(x, cache), np.zeros(shape), x)
