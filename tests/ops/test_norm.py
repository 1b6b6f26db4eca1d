"""Normalizations and their gradients: against sums written out number by number, PyTorch, and
finite differences."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ArgumentError, ArrayError, ShapeError, StateError
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    refuses_integers_and_lists,
    refuses_mixed,
    untouched,
    with_each_kernel,
)
from support.matrix import Here, needs

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}

# --- the oracle -----------------------------------------------------------------------------------


def normalize(x, sets, weight, bias, place, dy, eps, given=None):
    """Every step by itself: (y, dx, dweight, dbias, statistics).

    sets: lists of indices into x whose numbers share a mean; place: index -> the weight's index;
    given: (mean, var) for each set, where they do not come from x.
    """
    y, dx = np.zeros(x.shape), np.zeros(x.shape)
    dweight, dbias = np.zeros(weight.shape), np.zeros(bias.shape)
    statistics = []
    for number, members in enumerate(sets):
        values = [float(x[i]) for i in members]
        if given is None:
            mean = math.fsum(values) / len(values)
            var = math.fsum((v - mean) ** 2 for v in values) / len(values)
        else:
            mean, var = given[number]
        statistics.append((mean, var))
        spread = math.sqrt(var + eps)
        hats = [(v - mean) / spread for v in values]
        for i, hat in zip(members, hats, strict=True):
            y[i] = weight[place(i)] * hat + bias[place(i)]
            dweight[place(i)] += dy[i] * hat
            dbias[place(i)] += dy[i]
        # d hat_a / d x_b, a matrix
        ups = np.array([dy[i] * weight[place(i)] for i in members])
        jacobian = np.eye(len(members))
        if given is None:
            jacobian -= 1 / len(members) + np.outer(hats, hats) / len(members)
        for i, value in zip(members, ups @ jacobian / spread, strict=True):
            dx[i] = value
    return y, dx, dweight, dbias, statistics


def indices(shape):
    return list(product(*(range(n) for n in shape)))


@dataclass(frozen=True)
class Case:
    """One normalization: ``op``, the shape of x, and its own number or shape."""

    op: str
    shape: tuple[int, ...]
    own: Any = None
    eps: float = 1e-5
    affine: bool = True
    arguments: dict = field(default_factory=dict)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.own) if self.op == "layer_norm" else (self.shape[1],)

    def sets(self) -> list:
        """The indices that share statistics."""
        by: dict[Any, list] = {}
        for i in indices(self.shape):
            lead = len(self.shape) - len(self.weight_shape)
            key = {
                "batch_norm": lambda i=i: i[1],
                "instance_norm": lambda i=i: i[:2],
                "group_norm": lambda i=i: (i[0], i[1] // (self.shape[1] // self.own)),
                "layer_norm": lambda i=i, lead=lead: i[:lead],
            }[self.op]()
            by.setdefault(key, []).append(i)
        return list(by.values())

    def place(self) -> Callable:
        if self.op == "layer_norm":
            lead = len(self.shape) - len(self.weight_shape)
            return lambda i: i[lead:]
        return lambda i: (i[1],)

    def hosts(self, seed: int = 0) -> tuple:
        x = 3 + 2 * normal(*self.shape, seed=seed)
        if not self.affine:
            return x, None, None
        return (
            x,
            normal(*self.weight_shape, seed=seed + 1),
            normal(*self.weight_shape, seed=seed + 2),
        )

    def call(self, module: Any, x: Any, weight: Any, bias: Any, **more: Any) -> Any:
        function = getattr(module, self.op)
        options = {"eps": self.eps, **more}
        if self.op == "batch_norm":
            return function(x, None, None, weight, bias, training=True, **options)
        if self.op == "instance_norm":
            return function(x, None, None, weight, bias, **options)
        return function(x, self.own, weight, bias, **options)

    def backward(self, dy: Any, cache: Any, **options: Any) -> tuple:
        return getattr(ops, self.op + "_backward")(dy, cache, **options)


CASES = {
    "batch, images": Case("batch_norm", (3, 4, 2, 3)),
    "batch, vectors": Case("batch_norm", (5, 3)),
    "batch, one sample": Case("batch_norm", (1, 3, 2, 2)),
    "batch, volumes": Case("batch_norm", (2, 2, 2, 3, 2), eps=0.1),
    "batch, plain": Case("batch_norm", (3, 2, 4), affine=False),
    # strides say little of the memory format
    "batch, axes of one": Case("batch_norm", (1, 2, 1, 2)),
    "instance": Case("instance_norm", (3, 2, 4, 3)),
    "instance, plain": Case("instance_norm", (2, 3, 5), affine=False),
    "group": Case("group_norm", (3, 6, 2, 3), 3),
    "group, one for all": Case("group_norm", (2, 4, 3), 1, eps=0.01),
    "group, one each": Case("group_norm", (2, 3, 4), 3),
    "group, vectors": Case("group_norm", (2, 6), 2),
    "group, plain": Case("group_norm", (2, 4, 2, 2), 2, affine=False),
    "layer, vectors": Case("layer_norm", (4, 5), (5,)),
    "layer, images": Case("layer_norm", (3, 2, 3, 4), (2, 3, 4)),
    "layer, rows": Case("layer_norm", (2, 3, 2, 4), (4,)),
    "layer, two axes": Case("layer_norm", (2, 3, 2, 4), (2, 4)),
    "layer, all of it": Case("layer_norm", (3, 4), (3, 4)),
    "layer, plain": Case("layer_norm", (2, 3, 4), (4,), affine=False),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    op = draw(st.sampled_from(["batch_norm", "instance_norm", "group_norm", "layer_norm"]))
    groups, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    shape = (draw(st.integers(1, 3)), groups * each, *size)
    if op == "instance_norm" and math.prod(size) == 1:
        shape = (*shape[:2], 2)
    if math.prod(shape) // shape[1] == 1 and op != "layer_norm":
        shape = (2, *shape[1:])
    own = (
        groups
        if op == "group_norm"
        else shape[draw(st.integers(0, len(shape) - 1)) :]
        if op == "layer_norm"
        else None
    )
    return Case(op, shape, own, draw(st.sampled_from([1e-5, 0.1])), draw(st.booleans()))


def check(here: Here, case: Case, dtype: str, layouts: tuple[str, str], seed: int = 0) -> None:
    x, weight, bias = case.hosts(seed)
    dy = normal(*case.shape, seed=seed + 3)
    ones = np.ones(case.weight_shape)
    expected = normalize(
        x,
        case.sets(),
        ones if weight is None else weight,
        0 * ones if bias is None else bias,
        case.place(),
        dy,
        case.eps,
    )
    xs, dys = (laid_out(here, a, dtype, layout) for a, layout in zip((x, dy), layouts, strict=True))
    ws, bs = (None if a is None else here.array(a, dtype) for a in (weight, bias))
    with untouched(here, xs, ws, bs, dys):
        y, cache = case.call(ops, xs, ws, bs)
        gradients = case.backward(dys, cache)
    agree(here, y, expected[0], xs, TOLERANCE[dtype])
    agree(here, gradients[0], expected[1], xs, 10 * TOLERANCE[dtype])
    for gradient, wanted, given_ in zip(gradients[1:], expected[2:4], (ws, bs), strict=True):
        if given_ is None:
            assert gradient is None
        else:
            agree(here, gradient, wanted, xs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@cases
@with_each_kernel
def test_values_and_gradients(backend: Here, case: Case, dtype: str):
    check(backend, case, dtype, ("packed", "packed"))


@settings(max_examples=30)
@given(case=drawn(), dtype=st.just("float64"), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2))
@with_each_kernel
def test_drawn(backend: Here, case: Case, dtype: str, layouts: tuple[str, str]):
    check(backend, case, dtype, layouts, seed=5)


@pytest.mark.slow
@settings(max_examples=400)
@given(case=drawn(), dtype=st.just("float64"), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2))
@with_each_kernel
def test_drawn_at_length(backend: Here, case: Case, dtype: str, layouts: tuple[str, str]):
    check(backend, case, dtype, layouts, seed=7)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name",
    [
        "batch, images",
        "batch, axes of one",
        "instance",
        "group",
        "group, vectors",
        "layer, vectors",
        "layer, two axes",
    ],
)
@with_each_kernel
def test_memory_layouts(backend: Here, name: str, layout: str):
    check(backend, CASES[name], "float64", (layout, "packed"))
    check(backend, CASES[name], "float64", ("packed", layout))


@needs("torch")
@cases
@with_each_kernel
def test_pytorch(backend: Here, case: Case):
    import torch

    hosts = case.hosts(11)
    leaves = [None if a is None else torch.tensor(a, requires_grad=True) for a in hosts]
    expected = case.call(torch.nn.functional, *leaves)
    dy = normal(*case.shape, seed=14)
    expected.backward(torch.tensor(dy))
    arrays = [None if a is None else backend.array(a) for a in hosts]
    y, cache = case.call(ops, *arrays)
    agree(backend, y, expected.detach().numpy(), arrays[0], 1e-9)
    for gradient, leaf in zip(case.backward(backend.array(dy), cache), leaves, strict=True):
        if leaf is not None:
            agree(backend, gradient, leaf.grad.numpy(), arrays[0], 1e-9)


@pytest.mark.parametrize("name", ["batch, images", "instance", "group", "layer, two axes"])
@with_each_kernel
def test_numerical_gradient(backend: Here, name: str):
    case = CASES[name]
    hosts = case.hosts(21)
    arrays = [backend.array(a) for a in hosts]
    y, cache = case.call(ops, *arrays)
    dy = backend.array(normal(*y.shape, seed=22))
    for i, gradient in enumerate(case.backward(dy, cache)):

        def loss(a, i=i):
            changed = [*arrays[:i], a, *arrays[i + 1 :]]
            return backend.xp.sum(case.call(ops, *changed, keep=False)[0] * dy)

        gradient_agrees(backend, gradient, loss, hosts[i])


@cases
@with_each_kernel
def test_what_is_not_needed_is_not_made(backend: Here, case: Case):
    arrays = [None if a is None else backend.array(a) for a in case.hosts()]
    y, cache = case.call(ops, *arrays)
    quick, nothing = case.call(ops, *arrays, keep=False)
    assert nothing is None
    agree(backend, quick, backend.host(y), arrays[0])
    dx, dweight, dbias = case.backward(y, cache, need_dx=False)
    _, dweight2, dbias2 = case.backward(y, cache)
    assert dx is None
    for got, expected in ((dweight, dweight2), (dbias, dbias2)):
        assert (got is None) == (expected is None)
        if got is not None:
            agree(backend, got, backend.host(expected), arrays[0])


# --- running statistics ---------------------------------------------------------------------------


def writeable(here: Here, host: Any, dtype: str = "float64") -> Any:
    return here.backend.asarray(np.asarray(host), dtype)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 4, 2, 3), (2, 3), (1, 2, 2)])
@with_each_kernel
def test_running_statistics_move_towards_the_unbiased_ones(
    backend: Here, shape: tuple, momentum: float
):
    x, mean, var = 3 + normal(*shape), normal(shape[1], seed=1), 1 + normal(shape[1], seed=2) ** 2
    running_mean, running_var = writeable(backend, mean), writeable(backend, var)
    ops.batch_norm(backend.array(x), running_mean, running_var, training=True, momentum=momentum)
    for c in range(shape[1]):
        values = x[:, c].ravel()
        m = math.fsum(values) / len(values)
        v = math.fsum((a - m) ** 2 for a in values) / (len(values) - 1)
        mean[c] += momentum * (m - mean[c])
        var[c] += momentum * (v - var[c])
    agree(backend, running_mean, mean, running_mean, 1e-9)
    agree(backend, running_var, var, running_var, 1e-9)


@with_each_kernel
def test_momentum_may_be_an_array(backend: Here):
    x, plain = backend.array(normal(3, 2, 4)), [writeable(backend, np.ones(2)) for _ in range(2)]
    running = [writeable(backend, np.ones(2)) for _ in range(2)]
    ops.batch_norm(x, *plain, training=True, momentum=0.25)
    ops.batch_norm(x, *running, training=True, momentum=writeable(backend, 0.25))
    for a, b in zip(running, plain, strict=True):
        agree(backend, a, backend.host(b), a)


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
@with_each_kernel
def test_frozen_statistics_are_constants_to_the_backward_pass(backend: Here, op: str):
    x, weight, bias, dy = (
        normal(3, 2, 2, 3),
        normal(2, seed=1),
        normal(2, seed=2),
        normal(3, 2, 2, 3, seed=3),
    )
    mean, var = normal(2, seed=4), 0.5 + normal(2, seed=5) ** 2
    sets = CASES["batch, images"].__class__("batch_norm", x.shape).sets()
    given_ = list(zip(mean, var, strict=True))
    expected = normalize(x, sets, weight, bias, lambda i: (i[1],), dy, 1e-3, given_)
    arrays = [backend.array(a) for a in (x, mean, var, weight, bias)]
    mode = {"training": False} if op == "batch_norm" else {"use_input_stats": False}
    with untouched(backend, *arrays):
        y, cache = getattr(ops, op)(*arrays, **mode, eps=1e-3)
        gradients = getattr(ops, op + "_backward")(backend.array(dy), cache)
    for got, wanted in zip((y, *gradients), expected, strict=False):
        agree(backend, got, wanted, arrays[0], 1e-9)


@with_each_kernel
def test_frozen_gradients_are_those_of_the_statistics_at_the_forward(backend: Here):
    x = backend.array(normal(3, 2, 4))
    running = [writeable(backend, np.ones(2)) for _ in range(2)]
    y, cache = ops.batch_norm(x, *running)
    before = ops.batch_norm_backward(y, cache)[0]
    _, cache = ops.batch_norm(x, *running)
    ops.batch_norm(x, *running, training=True, momentum=0.9)
    agree(backend, ops.batch_norm_backward(y, cache)[0], backend.host(before), x)


@with_each_kernel
def test_instance_norms_running_statistics(backend: Here):
    """The mean over the samples of their means, and of their unbiased variances."""
    x = normal(3, 2, 4, 3)
    running = [writeable(backend, np.zeros(2)), writeable(backend, np.ones(2))]
    ops.instance_norm(backend.array(x), *running, momentum=0.3)
    means = x.mean(axis=(2, 3)).mean(axis=0)
    variances = x.reshape(3, 2, 12).var(axis=2, ddof=1).mean(axis=0)
    for got, wanted in zip(running, (0.3 * means, 0.7 + 0.3 * variances), strict=True):
        agree(backend, got, wanted, got, 1e-9)


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
    expected = normalize(x, case.sets(), ones, 0 * ones, case.place(), x, case.eps)
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
def test_empty_batches(backend: Here, case: Case):
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


# --- refusals -------------------------------------------------------------------------------------

X = normal(2, 4, 3)


@pytest.mark.parametrize(
    ("kind", "words", "call"),
    [
        (
            ShapeError,
            ("batch_norm", "weight of shape (4,)", "(3,)"),
            lambda a: ops.batch_norm(a(X), None, None, a(X[0, 0]), training=True),
        ),
        (
            ShapeError,
            ("batch_norm", "running_mean of shape (4,)"),
            lambda a: ops.batch_norm(a(X), a(X[0, 0]), a(X[0, 0])),
        ),
        (
            ShapeError,
            ("batch_norm", "at least 2 axes"),
            lambda a: ops.batch_norm(a(X[0, 0]), None, None, training=True),
        ),
        (
            ArgumentError,
            ("batch_norm", "running_mean", "required"),
            lambda a: ops.batch_norm(a(X), None, None),
        ),
        (
            ArgumentError,
            ("batch_norm", "pass both or neither"),
            lambda a: ops.batch_norm(a(X), None, a(X[0, :, 0]), training=True),
        ),
        (
            ArgumentError,
            ("batch_norm", "eps", "-1"),
            lambda a: ops.batch_norm(a(X), None, None, training=True, eps=-1),
        ),
        (
            ArgumentError,
            ("batch_norm", "momentum", "'a'"),
            lambda a: ops.batch_norm(a(X), None, None, training=True, momentum="a"),
        ),
        (ShapeError, ("instance_norm", "at least 3 axes"), lambda a: ops.instance_norm(a(X[0]))),
        (
            ArgumentError,
            ("instance_norm", "required"),
            lambda a: ops.instance_norm(a(X), use_input_stats=False),
        ),
        (ShapeError, ("group_norm", "4 channels", "3 groups"), lambda a: ops.group_norm(a(X), 3)),
        (ArgumentError, ("group_norm", "num_groups", "0"), lambda a: ops.group_norm(a(X), 0)),
        (ArgumentError, ("group_norm", "num_groups", "1.5"), lambda a: ops.group_norm(a(X), 1.5)),
        (
            ShapeError,
            ("group_norm", "bias of shape (4,)"),
            lambda a: ops.group_norm(a(X), 2, None, a(X[0, 0])),
        ),
        (
            ShapeError,
            ("layer_norm", "last axes are (4,)", "2x4x3"),
            lambda a: ops.layer_norm(a(X), 4),
        ),
        (ShapeError, ("layer_norm", "(1, 2, 4, 3)"), lambda a: ops.layer_norm(a(X), (1, 2, 4, 3))),
        (
            ShapeError,
            ("layer_norm", "weight of shape (4, 3)"),
            lambda a: ops.layer_norm(a(X), (4, 3), a(X[0, 0])),
        ),
        (ArgumentError, ("layer_norm", "normalized_shape"), lambda a: ops.layer_norm(a(X), ())),
        (
            ShapeError,
            ("local_response_norm", "at least 3 axes"),
            lambda a: ops.local_response_norm(a(X[0]), 2),
        ),
        (
            ArgumentError,
            ("local_response_norm", "size", "0"),
            lambda a: ops.local_response_norm(a(X), 0),
        ),
        (
            ArgumentError,
            ("local_response_norm", "beta", "nan"),
            lambda a: ops.local_response_norm(a(X), 2, beta=float("nan")),
        ),
    ],
)
def test_errors(backend: Here, kind, words, call):
    refuses(kind, *words, call=lambda: call(backend.array))


@pytest.mark.parametrize("name", ["batch, plain", "instance", "group", "layer, rows"])
def test_arrays_that_do_not_go_together(backend: Here, name: str):
    case = CASES[name]
    x, weight, bias = CASES[name].__class__(case.op, case.shape, case.own).hosts()
    refuses_integers_and_lists(backend, f"{case.op}: ", lambda x: case.call(ops, x, None, None), x)
    refuses_mixed(backend, f"{case.op}: ", lambda x, w: case.call(ops, x, w, None), x, weight)
    refuses_mixed(backend, f"{case.op}: ", lambda x, b: case.call(ops, x, None, b), x, bias)
    xs = backend.array(x, "float32")
    refuses(
        ArrayError,
        "expected an array",
        "list",
        call=lambda: case.call(ops, xs, weight.tolist(), None),
    )
    y, _ = case.call(ops, xs, None, None)
    refuses(StateError, "keep=True", call=lambda: case.backward(y, None))


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
