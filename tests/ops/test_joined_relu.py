"""Batch norm and ReLU in one op, sums, and sums and ReLU: against PyTorch in float64, and the
layers that run them."""

from typing import Any

import numpy as np
import pytest

from portacnn.backends import threads
from portacnn.errors import ShapeError, StateError
from portacnn.layers import BatchNorm1d, BatchNorm2d, ReLU, Residual, Sequential, container
from portacnn.layers.stages import FusedBatchNorm
from portacnn.ops import use_kernels
from portacnn.ops.fused import (
    add_relu,
    add_relu_backward,
    batch_norm_relu,
    batch_norm_relu_backward,
)
from portacnn.ops.join import add
from portacnn.ops.norm import batch_norm, batch_norm_backward
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    laid_out,
    normal,
    refuses,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs

CHOICES = pytest.mark.parametrize("choice", ["auto", "native", "reference"])
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


def by_pytorch(x, weight, bias, dy, mean=None, var=None, *, training=True, relu=True) -> tuple:
    """(y, dx, dweight, dbias) in float64; the running statistics are moved."""
    import torch

    leaves = [
        None if a is None else torch.tensor(np.asarray(a, np.float64), requires_grad=True)
        for a in (x, weight, bias)
    ]
    running = [None if a is None else torch.tensor(a) for a in (mean, var)]
    y = torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:], training=training)
    y = torch.relu(y) if relu else y
    y.backward(torch.tensor(np.asarray(dy, np.float64)))
    for host, moved in zip((mean, var), running, strict=True):
        if moved is not None:
            host[...] = moved.numpy()
    return (y.detach().numpy(), *(None if leaf is None else leaf.grad.numpy() for leaf in leaves))


# --- batch norm and ReLU --------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 2, 3), (2, 2, 2, 3, 2)])
@with_each_kernel
def test_batch_norm_relu(backend: Here, shape: tuple, layout: str, training: bool, affine: bool):
    x, dy = 1 + 2 * normal(*shape), normal(*shape, seed=1)
    weight, bias = (normal(shape[1], seed=2), normal(shape[1], seed=3)) if affine else (None, None)
    mean, var = normal(shape[1], seed=4), 0.5 + normal(shape[1], seed=5) ** 2
    running = [backend.backend.asarray(a) for a in (mean, var)]
    wanted = by_pytorch(x, weight, bias, dy, mean, var, training=training)
    xs, dys = (
        laid_out(backend, x, layout=layout),
        laid_out(backend, dy, layout=LAYOUTS[-1 - LAYOUTS.index(layout)]),
    )
    ws, bs = (None if a is None else backend.array(a) for a in (weight, bias))
    with untouched(backend, xs, dys, ws, bs):
        y, cache = batch_norm_relu(xs, *running, ws, bs, training=training)
        gradients = batch_norm_relu_backward(dys, cache)
        without = batch_norm_relu_backward(dys, cache, need_dx=False)
        assert batch_norm_relu(xs, None, None, ws, bs, training=True, keep=False)[1] is None
    for got, expected in zip((y, *gradients), wanted, strict=True):
        if expected is None:
            assert got is None
        else:
            agree(backend, got, expected, xs, 1e-11)
    assert without[0] is None
    for got, expected in zip(without[1:], wanted[2:], strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            agree(backend, got, expected, xs, 1e-11)
    for got, expected in zip(running, (mean, var), strict=True):
        agree(backend, got, expected, xs, 1e-12)


def strip(count: int, channels: int, seed: int = 0) -> np.ndarray:
    """(N, C, H, W) with ``count`` numbers a channel, no multiple of any vector or run."""
    return normal(1, channels, 1, count, seed=seed)


@needs("torch")
@CHOICES
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_numbers_in_blocks_and_threads(
    monkeypatch, dtype: str, training: bool, relu: bool, choice: str
):
    """More than a run, a block of channels, and a thread's share; in the second channel the first
    numbers are far from the mean."""
    monkeypatch.setattr(threads, "thread_count", lambda: 2)
    x, dy = strip(50_021, 9), strip(50_021, 9, seed=1)
    x[:, 1, :, :70] += 500
    x[:, 2] += 100
    x, dy = x.astype(dtype), dy.astype(dtype)
    weight, bias = (1 + normal(9, seed=s).astype(dtype) / 8 for s in (2, 3))
    mean, var = (np.full(9, number, dtype) for number in (0.5, 1.5))
    wide = [np.asarray(a, np.float64) for a in (mean, var)]
    wanted = by_pytorch(x, weight, bias, dy, *wide, training=training, relu=relu)
    forward, back = (
        (batch_norm_relu, batch_norm_relu_backward) if relu else (batch_norm, batch_norm_backward)
    )
    with use_kernels(choice):
        y, cache = forward(x, mean, var, weight, bias, training=training)
        gradients = back(dy, cache)
    # about zero the rounded and the exact output may be on different sides
    if relu and dtype == "float32":
        flipped = (y > 0) != (wanted[0] > 0)
        assert flipped.mean() < 1e-5
        gradients[0][flipped] = wanted[1][flipped]
    for got, expected in zip((y, *gradients, mean, var), (*wanted, *wide), strict=True):
        np.testing.assert_allclose(
            got,
            expected,
            rtol=10 * TOLERANCE[dtype],
            atol=TOLERANCE[dtype] * np.abs(expected).max(),
        )


@CHOICES
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_finite_passes_through_as_in_the_reference(
    odd: float, training: bool, choice: str
):
    x, dy = normal(4, 3, 5, 6), normal(4, 3, 5, 6, seed=1)
    x[2, 1, 3, 3] = odd
    dy[1, 2, 0, 0] = odd
    running = [np.zeros(3), np.ones(3)]
    for forward, back in (
        (batch_norm, batch_norm_backward),
        (batch_norm_relu, batch_norm_relu_backward),
    ):
        results = []
        for kernels in (choice, "reference"):
            with use_kernels(kernels):
                y, cache = forward(
                    x, *map(np.copy, running), np.ones(3), np.ones(3), training=training
                )
                results.append((y, *back(dy, cache)))
        for got, expected in zip(*results, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@CHOICES
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1e4 / 3])
def test_many_constants_become_the_bias(value: float, choice: str):
    x, weight, bias = (
        np.full((3, 2, 60, 51), value, "float32"),
        normal(2).astype("f4"),
        np.array([0.3, -0.7], "f4"),
    )
    with use_kernels(choice):
        y, cache = batch_norm(x, None, None, weight, bias, training=True)
        dx, dweight, _ = batch_norm_backward(np.ones_like(x), cache)
        positive = batch_norm_relu(x, None, None, weight, bias, training=True)[0]
    assert (y == bias[:, None, None]).all()
    assert (positive == np.maximum(bias, 0)[:, None, None]).all()
    assert (dweight == 0).all()
    assert np.abs(dx).max() < 1e-2  # of sums divided by sqrt(eps)


@needs("torch")
@CHOICES
def test_a_mean_between_two_numbers_that_float32_has(choice: str):
    """Half of the numbers one step above the others: the mean cannot be written down, and what it
    splits must not move."""
    step = float(np.spacing(np.float32(3000)))
    x = np.where(np.arange(4096) % 2, 3000 + step, 3000).astype("float32").reshape(2, 1, 2048)
    dy = (normal(2, 1, 2048) + (x - 3000) / step + 1).astype("float32")
    one, none = np.ones(1, "float32"), np.zeros(1, "float32")
    wanted = by_pytorch(x, one, none, dy, relu=False)
    with use_kernels(choice):
        y, cache = batch_norm(x, None, None, one, none, training=True)
        gradients = batch_norm_backward(dy, cache)
    for got, expected in zip((y, *gradients), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@CHOICES
def test_first_numbers_far_from_all_others(choice: str):
    """The spread about them is a thousand times that about the mean: no digit of the difference may
    be left."""
    x = normal(1, 1, 1 << 20).astype("float32")
    x[..., :64] += 1e4
    mean, var = np.zeros(1, "float32"), np.zeros(1, "float32")
    with use_kernels(choice):
        batch_norm(x, mean, var, training=True, momentum=1.0)
    np.testing.assert_allclose(mean, x.mean(dtype="float64"), atol=1e-5 * x.std(dtype="float64"))
    np.testing.assert_allclose(var, x.var(dtype="float64", ddof=1), rtol=1e-5)


@with_each_kernel
def test_batch_norm_relu_of_an_empty_batch_and_refusals(backend: Here):
    y, cache = batch_norm_relu(backend.array(np.zeros((0, 3, 2))), None, None, training=True)
    assert tuple(y.shape) == tuple(batch_norm_relu_backward(y, cache)[0].shape) == (0, 3, 2)
    one = backend.array(normal(1, 3, 1))
    refuses(
        ShapeError,
        "batch_norm_relu: ",
        "more than 1",
        call=lambda: batch_norm_relu(one, None, None, training=True),
    )


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "layouts",
    [("packed",) * 3, ("batch_last", "reversed", "stepped"), ("stepped", "batch_last", "packed")],
)
@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 4, 2, 3), (4, 40, 30, 31)])
@with_each_kernel
def test_sums(backend: Here, shape: tuple, layouts: tuple, count: int):
    hosts = [normal(*shape, seed=seed).astype("float32") for seed in range(count)]
    dy = normal(*shape, seed=7).astype("float32")
    parts = [laid_out(backend, a, layout=layout) for a, layout in zip(hosts, layouts, strict=False)]
    dys = backend.array(dy)
    total = np.asarray(sum(hosts))
    with untouched(backend, *parts, dys):
        agree(backend, add(parts), total, dys, 0.0)
        y, cache = add_relu(parts, keep=True)
        agree(backend, y, np.maximum(total, 0), dys, 0.0)
        agree(backend, add_relu_backward(dys, cache), np.where(total > 0, dy, 0), dys, 0.0)
    assert add_relu(parts, keep=False)[1] is None


@CHOICES
def test_sums_of_what_is_not_finite(choice: str):
    a, b = np.array([np.nan, np.inf, -np.inf, np.inf, -1.0]), np.array([1.0, 1.0, 1.0, -1.0, 0.5])
    with use_kernels(choice):
        np.testing.assert_array_equal(add([a, b]), a + b)
        y, cache = add_relu([a, b])
        np.testing.assert_array_equal(y, [np.nan, np.inf, 0, np.inf, 0])
        np.testing.assert_array_equal(
            add_relu_backward(np.full(5, np.inf), cache), [np.inf, np.inf, 0, np.inf, 0]
        )


@with_each_kernel
def test_sums_refuse_other_shapes(backend: Here):
    parts = [backend.array(normal(2, 3)), backend.array(normal(2, 1))]
    for op in (add, add_relu):
        refuses(ShapeError, "one shape", "2x3", "2x1", call=lambda op=op: op(parts))


# --- in layers ------------------------------------------------------------------------------------


class Louder(ReLU):
    """Derived: it might do anything."""


def test_which_layers_run_as_one():
    def kinds(*layers):
        return [type(stage) for stage in Sequential(*layers).stages]

    assert kinds(BatchNorm2d(2), ReLU(), ReLU()) == [FusedBatchNorm, ReLU]
    assert kinds(BatchNorm1d(2), Louder()) == [BatchNorm1d, Louder]
    assert kinds(type("Own", (BatchNorm2d,), {})(2), ReLU())[1] is ReLU


@needs("torch")
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}], ids=str
)
@with_each_kernel
def test_batch_norm_and_relu_behave_as_the_two_layers(backend: Here, options: dict):
    """Several steps, and inference between them: outputs, gradients and every buffer are
    PyTorch's."""
    import torch

    ours = Sequential(bn=BatchNorm2d(3, **options), relu=ReLU()).build(
        (3, 4, 5), device=backend.device, dtype="float64", seed=0
    )
    theirs = torch.nn.Sequential()
    theirs.add_module("bn", torch.nn.BatchNorm2d(3, dtype=torch.float64, **options))
    theirs.add_module("relu", torch.nn.ReLU())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for step in range(3):
        host, up = 1 + normal(4, 3, 4, 5, seed=step), normal(4, 3, 4, 5, seed=10 + step)
        x, leaf = backend.array(host), torch.tensor(host, requires_grad=True)
        (y, cache), expected = ours.forward(x, train=True), theirs.train()(leaf)
        theirs.zero_grad()
        expected.backward(torch.tensor(up))
        agree(backend, y, expected.detach().numpy(), x, 1e-11)
        agree(backend, ours(x), theirs.eval()(leaf).detach().numpy(), x, 1e-11)  # disturbs nothing
        agree(backend, ours.prepare(x)(x), theirs(leaf).detach().numpy(), x, 1e-11)
        agree(backend, ours.backward(backend.array(up), cache), leaf.grad.numpy(), x, 1e-11)
        for name, parameter in theirs.named_parameters():
            agree(backend, ours.named_gradients()[name], parameter.grad.numpy(), x, 1e-11)
        for name, value in theirs.state_dict().items():
            np.testing.assert_allclose(
                ours.state_dict()[name], value.numpy(), rtol=1e-11, atol=1e-11
            )
    refuses(StateError, "Sequential", "has been used", call=lambda: ours.backward(x, cache))


@needs("torch")
@pytest.mark.parametrize("activation", [ReLU, Louder])
@with_each_kernel
def test_a_residual_block_with_relu(backend: Here, activation: Any):
    calls = []
    host, up = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    block = Residual(BatchNorm2d(2, affine=False), activation=activation()).build(
        (2, 4, 4), device=backend.device, dtype="float64"
    )
    x = backend.array(host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            container, "add_relu", lambda *args, **k: calls.append(args) or add_relu(*args, **k)
        )
        block.forward(x)
    assert len(calls) == (activation is ReLU)
    hat = (host - host.mean((0, 2, 3), keepdims=True)) / np.sqrt(
        host.var((0, 2, 3), keepdims=True) + 1e-5
    )
    above = up * (hat + host > 0)
    through = by_pytorch(host, None, None, above, relu=False)[1]
    with untouched(backend, x):
        y, cache = block.forward(x, train=True)
        agree(backend, y, np.maximum(hat + host, 0), x, 1e-11)
        agree(backend, block.backward(backend.array(up), cache), through + above, x, 1e-11)
    refuses(StateError, "Residual", "has been used", call=lambda: block.backward(x, cache))


def test_an_observed_activation_of_a_block_runs_by_itself(backend: Here):
    x, seen = backend.array(normal(3, 2, 4, 4)), []
    block = Residual(BatchNorm2d(2), activation=ReLU()).build(
        (2, 4, 4), device=backend.device, dtype="float64"
    )
    wanted, cache = block.forward(x, train=True)
    gradient = backend.host(block.backward(x, cache))
    handle = block.activation.on_output(lambda y: seen.append(backend.host(y)))
    y, cache = block.forward(x, train=True)
    agree(backend, y, backend.host(wanted), x, 1e-12)
    np.testing.assert_array_equal(seen[0], backend.host(y))
    agree(backend, block.backward(x, cache), gradient, x, 1e-12)
    handle.remove()
    block(x)
    assert len(seen) == 1
