"""Normalizations and their gradients: against sums written out number by number, PyTorch, and
finite differences."""

import math

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
from support.norm_cases import CASES, TOLERANCE, Case, by_definition, cases, writeable


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
    expected = by_definition(
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
def test_values_and_gradients_are_correct(backend: Here, case: Case, dtype: str):
    check(backend, case, dtype, ("packed", "packed"))


@settings(max_examples=30)
@given(case=drawn(), dtype=st.just("float64"), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2))
@with_each_kernel
def test_drawn_arguments_agree_with_the_reference(
    backend: Here, case: Case, dtype: str, layouts: tuple[str, str]
):
    check(backend, case, dtype, layouts, seed=5)


@pytest.mark.slow
@settings(max_examples=400)
@given(case=drawn(), dtype=st.just("float64"), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2))
@with_each_kernel
def test_many_drawn_arguments_agree_with_the_reference(
    backend: Here, case: Case, dtype: str, layouts: tuple[str, str]
):
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
def test_any_memory_layout_is_accepted(backend: Here, name: str, layout: str):
    check(backend, CASES[name], "float64", (layout, "packed"))
    check(backend, CASES[name], "float64", ("packed", layout))


@needs("torch")
@cases
@with_each_kernel
def test_values_and_gradients_agree_with_pytorch(backend: Here, case: Case):
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
def test_gradients_agree_with_numerical_gradients(backend: Here, name: str):
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
    expected = by_definition(x, sets, weight, bias, lambda i: (i[1],), dy, 1e-3, given_)
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
def test_wrong_arguments_are_refused(backend: Here, kind, words, call):
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
