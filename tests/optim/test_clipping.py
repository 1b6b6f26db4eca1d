"""The clipping of gradients by their norm, against PyTorch's."""

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ArgumentError, ArrayError
from portacnn.ops import use_kernels
from support.matrix import needs
from support.optimizers import SHAPES, close, gradients, writable


@needs("torch")
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 7.0, 1e3, float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipping_as_in_torch(backend, max_norm, dtype, kernels):
    import torch

    for seed in range(3):
        theirs = {
            path: torch.zeros(shape, dtype=getattr(torch, dtype)) for path, shape in SHAPES.items()
        }
        for path, value in gradients(seed).items():
            theirs[path].grad = torch.tensor(value, dtype=getattr(torch, dtype))
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        grads = writable(backend, gradients(seed), dtype)
        with use_kernels(kernels):
            norm = ops.clip_by_global_norm(list(grads.values()), max_norm)
        assert norm.ndim == 0
        assert norm.dtype == getattr(backend.xp, dtype)
        tolerance = 1e-6 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(backend.host(norm), expected.numpy(), rtol=tolerance)
        close(
            backend, grads, {path: value.grad.numpy() for path, value in theirs.items()}, tolerance
        )
        assert all(g.dtype == getattr(backend.xp, dtype) for g in grads.values())


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("max_norm", [2.5, 1e3])
def test_only_gradients_longer_than_the_bound_are_scaled(backend, max_norm, kernels):
    before = gradients(0)
    norm = np.linalg.norm(np.concatenate([value.ravel() for value in before.values()]))
    assert 2.5 < norm < 1e3
    grads = writable(backend, before, "float64")
    with use_kernels(kernels):
        found = ops.clip_by_global_norm(list(grads.values()), max_norm)
    np.testing.assert_allclose(backend.host(found), norm, rtol=1e-12)
    factor = max_norm / norm if max_norm < norm else 1.0
    for path, value in before.items():
        np.testing.assert_allclose(backend.host(grads[path]), factor * value, rtol=1e-6)


def test_clipping_of_nothing_and_of_too_much(backend):
    for kernels in ("auto", "reference"):
        with use_kernels(kernels):
            zeros = [backend.backend.asarray(np.zeros(4))]
            assert backend.host(ops.clip_by_global_norm(zeros, 1.0)) == 0
            assert (backend.host(zeros[0]) == 0).all()
            wrong = [
                backend.backend.asarray(np.array([1.0, np.nan])),
                backend.backend.asarray(np.ones(2)),
            ]
            assert np.isnan(backend.host(ops.clip_by_global_norm(wrong, 1.0)))
            assert np.isnan(backend.host(wrong[1])).all()
            empty = [
                backend.backend.asarray(np.zeros((0, 3))),
                backend.backend.asarray(np.array([3.0, 4.0])),
            ]
            np.testing.assert_allclose(backend.host(ops.clip_by_global_norm(empty, 1.0)), 5.0)
            np.testing.assert_allclose(backend.host(empty[1]), [0.6, 0.8], rtol=1e-6)


def test_clipping_refuses(backend):
    array = backend.backend.asarray
    for max_norm in (0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="clip_by_global_norm: max_norm must be above 0"):
            ops.clip_by_global_norm([array(np.ones(2))], max_norm)
    with pytest.raises(ArgumentError, match="got none"):
        ops.clip_by_global_norm([], 1.0)
    with pytest.raises(ArrayError, match=r"of one dtype.*grads\[1\]"):
        ops.clip_by_global_norm([array(np.ones(2)), array(np.ones(2), "float32")], 1.0)
    with pytest.raises(ArrayError, match="floating point"):
        ops.clip_by_global_norm([array(np.ones(2, dtype=np.int64))], 1.0)
