"""Normalization of constants, of large means and variances, of empty batches, of long rows."""

import math

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ShapeError
from support.checks import (
    agree,
    normal,
    refuses,
    untouched,
    with_each_kernel,
)
from support.matrix import Here
from support.norm_cases import CASES, Case, by_definition, indices, writeable


@pytest.mark.parametrize("count", [127, 128, 129, 255, 257, 385])
def test_sums_in_blocks_leave_nothing_out(backend: Here, count: int):
    """Along an axis that is not the memory's last, numbers are added up 128 at a time: those that
    are left over count too."""
    x = normal(2, 3, count)
    with ops.use_kernels("reference"):
        y, _ = ops.instance_norm(backend.array(x), eps=0.0)
    mean, spread = x.mean(axis=2, keepdims=True), x.std(axis=2, keepdims=True)
    agree(backend, y, (x - mean) / spread, backend.array(x), 1e-9)


# --- hard numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["batch, images", "instance", "group", "layer, images"])
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e4 / 3])
@with_each_kernel
def test_constants_become_the_bias(backend: Here, name: str, value: float):
    case = CASES[name]
    _, weight, bias = case.hosts()
    x = backend.array(np.full(case.shape, value), "float32")
    weight, bias = backend.array(weight, "float32"), backend.array(bias, "float32")
    y, cache = case.call(ops, x, weight, bias)
    expected = np.zeros(case.shape)
    for i in indices(case.shape):
        expected[i] = backend.host(bias)[case.place()(i)]
    agree(backend, y, expected, x, 1e-5)
    dx, dweight, _ = case.backward(y, cache)
    assert np.isfinite(backend.host(dx)).all()
    assert np.abs(backend.host(dweight)).max() < 1e-4


@pytest.mark.parametrize("name", ["batch, images", "instance", "group", "layer, images"])
@with_each_kernel
def test_a_mean_that_is_large_beside_the_spread(backend: Here, name: str):
    """float32 numbers around 1000, in steps of 1/64: all of them exact, only the sums are not."""
    case = CASES[name]
    x = 1000 + np.round(normal(*case.shape, seed=3) * 32) / 64
    ones = np.ones(case.weight_shape)
    expected = by_definition(x, case.sets(), ones, 0 * ones, case.place(), x, case.eps)
    xs = backend.array(x, "float32")
    agree(backend, case.call(ops, xs, None, None)[0], expected[0], xs, 1e-4)


@pytest.mark.parametrize("op", ["instance_norm", "group_norm", "layer_norm"])
def test_sums_over_large_samples_keep_their_digits(backend: Here, op: str):
    """One sample of a quarter million numbers in a batch-last array: added row by row, float32
    would be off by 1e-3."""
    host = np.linspace(0.5, 1.5, 512 * 512, dtype=np.float32).reshape(1, 512, 512, 1)
    # (2, 1, 512, 512), batch last in memory
    host = np.concatenate([host, host[:, ::-1]], axis=3).transpose(3, 0, 1, 2)
    x = backend.xp.permute_dims(backend.array(host.transpose(1, 2, 3, 0)), (3, 0, 1, 2))
    own = {"instance_norm": (), "group_norm": (1,), "layer_norm": ((1, 512, 512),)}[op]
    with ops.use_kernels("reference"):
        y, cache = getattr(ops, op)(x, *own)
        dx = getattr(ops, op + "_backward")(x, cache)[0]
    wide = host.astype(np.float64)
    spread = np.sqrt(wide[0].var() + 1e-5)
    hat = (wide - wide[0].mean()) / spread
    agree(backend, y, hat, x, 2e-6)
    expected = (wide - wide[0].mean() - hat * (wide[0] * hat[0]).mean()) / spread
    agree(backend, dx, expected, x, 2e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case("batch_norm", (0, 3, 2, 2)),
        Case("instance_norm", (0, 3, 2, 2)),
        Case("group_norm", (0, 4, 2), 2),
        Case("layer_norm", (0, 3, 2), (3, 2)),
        Case("layer_norm", (0, 2), (2,)),
        Case("layer_norm", (2, 0, 2), (2,)),
    ],
    ids=str,
)
@with_each_kernel
def test_empty_batches_are_accepted(backend: Here, case: Case):
    arrays = [backend.array(a) for a in case.hosts()]
    y, cache = case.call(ops, *arrays)
    agree(backend, y, np.zeros(case.shape), arrays[0])
    dx, dweight, dbias = case.backward(y, cache)
    agree(backend, dx, np.zeros(case.shape), arrays[0])
    agree(backend, dweight, np.zeros(case.weight_shape), arrays[0])
    agree(backend, dbias, np.zeros(case.weight_shape), arrays[0])


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@with_each_kernel
def test_empty_batches_leave_running_statistics_alone(backend: Here, op: str):
    x = backend.array(np.zeros((0, 2, 3)))
    running = [writeable(backend, [1.0, 2.0]), writeable(backend, [3.0, 4.0])]
    mode = {"training": True} if op == "batch_norm" else {}
    with untouched(backend, *running):
        getattr(ops, op)(x, *running, **mode)
        y, _ = ops.batch_norm(x, *running)
    assert tuple(y.shape) == (0, 2, 3)


def test_one_value_has_no_variance(backend: Here):
    one = backend.array(normal(1, 3, 1, 1))
    more = "more than 1"
    refuses(
        ShapeError,
        "batch_norm: ",
        more,
        "1x3x1x1",
        call=lambda: ops.batch_norm(one, None, None, training=True),
    )
    refuses(
        ShapeError,
        "batch_norm: ",
        more,
        call=lambda: ops.batch_norm(one[:, :, 0, 0], None, None, training=True),
    )
    refuses(
        ShapeError,
        "instance_norm: ",
        more,
        call=lambda: ops.instance_norm(backend.array(normal(2, 3, 1, 1))),
    )
    refuses(ShapeError, "group_norm: ", more, call=lambda: ops.group_norm(one, 3))
    y, _ = ops.layer_norm(backend.array(normal(2, 1)), 1)
    agree(backend, y, np.zeros((2, 1)), one)
    y, _ = ops.batch_norm(one, *(backend.array(np.ones(3)) for _ in range(2)), eps=0.0)
    agree(backend, y, backend.host(one) - 1, one)


@pytest.mark.parametrize("scale", [1e-15, 1e18, 1e20, 1e25, 1e30])
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@with_each_kernel
def test_variances_beyond_float32(backend: Here, scale: float, eps: float):
    """Finite all along, and no further from 0 than the true values, which are sqrt(count - 1) at
    most.

    PyTorch's own group and layer norm give NaN there.
    """
    for shape in ((100, 3, 4, 4), (8, 3)):
        host = normal(*shape) * scale
        x, dy = backend.array(host, "float32"), backend.array(normal(*shape, seed=1), "float32")
        for call in (
            lambda x: (
                ops.batch_norm(x, None, None, training=True, eps=eps),
                ops.batch_norm_backward,
            ),
            lambda x: (ops.group_norm(x, 1, eps=eps), ops.group_norm_backward),
            lambda x: (ops.layer_norm(x, x.shape[-1], eps=eps), ops.layer_norm_backward),
        ):
            (y, cache), backward = call(x)
            if backend.backend.name == "torch" and backward is not ops.batch_norm_backward:
                continue
            y = backend.host(y)
            dx, _, _ = backward(dy, cache)
            assert np.isfinite(y).all()
            assert np.isfinite(backend.host(dx)).all()
            assert np.abs(y).max() < math.sqrt(host.size)


@pytest.mark.parametrize("count", [2048, 2049, 4097, 9001])
@with_each_kernel
def test_long_rows_are_summed_once(backend: Here, count: int):
    """Kernels sum a channel in runs of 2048 or 4096: each number belongs to one."""
    x, dy = 1 + normal(1, 2, count), normal(1, 2, count, seed=1)
    weight = backend.array(np.ones(2))
    y, cache = ops.batch_norm(backend.array(x), None, None, weight, weight, training=True, eps=0.0)
    xhat = (x - x.mean(axis=2, keepdims=True)) / x.std(axis=2, keepdims=True)
    agree(backend, y, xhat + 1, weight, 1e-10)
    _, dweight, dbias = ops.batch_norm_backward(backend.array(dy), cache)
    agree(backend, dweight, (dy * xhat).sum(axis=(0, 2)), weight, 1e-10)
    agree(backend, dbias, dy.sum(axis=(0, 2)), weight, 1e-10)
