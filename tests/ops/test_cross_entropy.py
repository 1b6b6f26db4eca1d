"""Softmax with cross-entropy: every kind of target, weights, smoothing, reductions, and logits that
overflow an exp."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ArgumentError, ArrayError, LabelError, ShapeError, StateError
from portacnn.ops import relu, softmax_cross_entropy, softmax_cross_entropy_backward
from support import oracles
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

KINDS = ("int64", "int32", "one-hot", "soft")


def targets(kind: str, shape: tuple[int, ...], seed: int = 1) -> np.ndarray:
    """Labels for logits of this shape, (N, C, ...)."""
    rng = np.random.default_rng(seed)
    if kind == "soft":
        share = rng.random(shape) + 0.01
        return share / share.sum(axis=1, keepdims=True)
    labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    if kind == "one-hot":
        return np.moveaxis(np.eye(shape[1])[labels], -1, 1).astype("float64")
    return labels.astype(kind)


def check(
    here: Here,
    logits: np.ndarray,
    target: np.ndarray,
    dtype: str,
    layouts: tuple[str, str],
    **options: Any,
) -> None:
    """Loss and gradient against the loops, for a dy that is not one."""
    expected, gradient = oracles.cross_entropy(logits, target, **options)
    dy = normal(*expected.shape, seed=3) if expected.ndim else np.asarray(1.5)
    gradient = gradient * (np.expand_dims(dy, 1) if expected.ndim else dy)
    x = laid_out(here, logits, dtype, layouts[0])
    t = laid_out(here, target, dtype if target.dtype.kind == "f" else None, layouts[1])
    if (weight := options.pop("weight", None)) is not None:
        options["weight"] = here.array(weight, dtype)
    dys = here.array(dy, dtype)
    with untouched(here, x, t, dys, options.get("weight")):
        loss, cache = softmax_cross_entropy(x, t, **options)
        dx = softmax_cross_entropy_backward(dys, cache)
    # NumPy's reductions of everything to a number give NumPy scalars
    agree(here, here.xp.asarray(loss), expected, x)
    agree(here, dx, gradient, x)


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5)) | st.tuples(*[st.integers(1, 3)] * 4),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    weighted=st.booleans(),
)
@with_each_kernel
def test_drawn_arguments_agree_with_the_reference(
    backend: Here, shape, kind, dtype, layouts, label_smoothing, reduction, weighted
):
    options = {"label_smoothing": label_smoothing, "reduction": reduction}
    if weighted:
        options["weight"] = np.arange(1, shape[1] + 1) / 2
    check(backend, 3 * normal(*shape), targets(kind, shape), dtype, layouts, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("weighted", [False, True])
@with_each_kernel
def test_ignored_labels(backend: Here, weighted: bool, ignore_index: int, reduction: str):
    logits, target = normal(3, 4, 2, 2), targets("int64", (3, 4, 2, 2))
    target[0, 0, 0] = target[2, 1, 1] = ignore_index
    options = {"ignore_index": ignore_index, "reduction": reduction}
    if weighted:
        options["weight"] = np.array([1.0, 0.5, 0.0, 2.0])
    for smoothing in (0.0, 0.2):
        check(
            backend,
            logits,
            target,
            "float64",
            ("packed", "packed"),
            label_smoothing=smoothing,
            **options,
        )


@needs("torch")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 2, 4)])
@with_each_kernel
def test_cross_entropy_agrees_with_pytorch(
    backend: Here, shape, kind, weighted, label_smoothing, reduction
):
    import torch

    logits, target = normal(*shape), targets(kind, shape)
    weight = np.linspace(0.5, 2.0, shape[1]) if weighted else None
    if kind.startswith("int"):
        target.reshape(-1)[0] = -100
    leaf = torch.tensor(logits, requires_grad=True)
    theirs = torch.tensor(target, dtype=torch.int64 if kind.startswith("int") else torch.float64)
    expected = torch.nn.functional.cross_entropy(
        leaf,
        theirs,
        None if weight is None else torch.tensor(weight),
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    expected.sum().backward()
    x = backend.array(logits)
    options = {} if weight is None else {"weight": backend.array(weight)}
    loss, cache = softmax_cross_entropy(
        x, backend.array(target), label_smoothing=label_smoothing, reduction=reduction, **options
    )
    agree(backend, backend.xp.asarray(loss), expected.detach().numpy(), x)
    dy = backend.array(np.ones(expected.shape))
    agree(backend, softmax_cross_entropy_backward(dy, cache), leaf.grad.numpy(), x)


@pytest.mark.parametrize("kind", ["int64", "soft"])
@with_each_kernel
def test_gradients_agree_with_numerical_gradients(backend: Here, kind: str):
    host = normal(3, 4)
    target, weight = backend.array(targets(kind, host.shape)), backend.array([1.0, 2.0, 0.5, 1.0])
    options = {"weight": weight, "label_smoothing": 0.1}
    dx = softmax_cross_entropy_backward(
        1.0, softmax_cross_entropy(backend.array(host), target, **options)[1]
    )
    gradient_agrees(
        backend, dx, lambda a: softmax_cross_entropy(a, target, keep=False, **options)[0], host
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@with_each_kernel
def test_logits_that_would_overflow(backend: Here, kind: str, dtype: str):
    logits = np.array([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, -1e4]])
    check(backend, logits, targets(kind, logits.shape), dtype, ("packed", "packed"))


@pytest.mark.parametrize("kind", ["int64", "one-hot"])
@with_each_kernel
def test_minus_infinity_in_a_class_without_a_share(backend: Here, kind: str):
    logits = np.array([[0.5, -np.inf, 1.0], [-np.inf, -np.inf, 2.0]])
    target = np.array([0, 2]) if kind == "int64" else np.eye(3)[[0, 2]]
    check(backend, logits, target, "float64", ("packed", "packed"))


@pytest.mark.parametrize("label", [-1, 3, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@with_each_kernel
def test_a_label_out_of_range_gives_nan(backend: Here, reduction: str, label: int):
    logits = backend.array(normal(3, 3))
    loss, _ = softmax_cross_entropy(
        logits, backend.array(np.array([0, label, 2])), reduction=reduction
    )
    expected = [False, True, False] if reduction == "none" else True
    np.testing.assert_array_equal(np.isnan(backend.host(backend.xp.asarray(loss))), expected)


@pytest.mark.parametrize(("classes", "labels"), [(10, (9, 0, 3)), (200, (156, 199, 0))])
def test_labels_of_one_byte(backend: Here, classes: int, labels: tuple[int, ...]):
    """Data sets keep labels as uint8. 156 is what -100 becomes there."""
    check(
        backend,
        normal(3, classes),
        np.array(labels, dtype="uint8"),
        "float64",
        ("packed", "packed"),
    )


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_more_classes_than_labels_of_one_byte_can_name(backend: Here, dtype: str):
    """Such labels reach the first classes only, which is no reason to take class 271 for class
    15."""
    check(backend, normal(2, 300), np.array([15, 1], dtype=dtype), "float64", ("packed", "packed"))


@pytest.mark.parametrize("kind", ["int64", "one-hot"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@with_each_kernel
def test_an_empty_batch_is_accepted(backend: Here, reduction: str, kind: str):
    x = backend.array(np.zeros((0, 3)))
    loss, cache = softmax_cross_entropy(
        x, backend.array(targets(kind, (0, 3))), reduction=reduction
    )
    agree(backend, backend.xp.asarray(loss), np.zeros((0,) if reduction == "none" else ()), x)
    assert tuple(softmax_cross_entropy_backward(loss, cache).shape) == (0, 3)


@pytest.mark.parametrize("what", ["none there", "none there, one-hot", "all ignored"])
def test_the_mean_of_nothing_is_nan(backend: Here, what: str):
    """As in PyTorch, and without a warning (an error here)."""
    shape = (2, 3) if what == "all ignored" else (0, 3)
    target = (
        np.full(2, -100)
        if what == "all ignored"
        else targets("one-hot" if "hot" in what else "int64", shape)
    )
    loss, _ = softmax_cross_entropy(backend.array(normal(*shape)), backend.array(target))
    assert np.isnan(backend.host(backend.xp.asarray(loss)))


def test_caches(backend: Here):
    x, target = backend.array(normal(2, 3)), backend.array(np.array([0, 1]))
    loss, cache = softmax_cross_entropy(x, target, keep=False)
    assert cache is None
    kept, _ = softmax_cross_entropy(x, target)
    agree(backend, backend.xp.asarray(loss), backend.host(backend.xp.asarray(kept)), x, tolerance=0)
    refuses(StateError, "keep=True", call=lambda: softmax_cross_entropy_backward(1.0, None))
    refuses(
        StateError,
        "cross_entropy",
        "relu",
        call=lambda: softmax_cross_entropy_backward(1.0, relu(x)[1]),
    )


@pytest.mark.parametrize(
    ("kind", "words", "logits", "target", "options"),
    [
        (ShapeError, ("(N, C, ...)", "3, "), (3,), np.zeros(3, int), {}),
        (LabelError, ("shape (3,)", "(3, 4)", "got (4,)"), (3, 4), np.zeros(4, int), {}),
        (LabelError, ("shape (3, 2)", "(3, 4, 2)", "got (3,)"), (3, 4, 2), np.zeros(3, int), {}),
        (LabelError, ("one-hot of (3, 4)", "got (3, 5)"), (3, 4), np.zeros((3, 5)), {}),
        (LabelError, ("must be integers", "float64"), (3, 4), np.zeros(3), {}),
        (ShapeError, ("(4,)", "(3,)"), (3, 4), np.zeros(3, int), {"weight": np.ones(3)}),
        (
            ArgumentError,
            ("label_smoothing", "0..1", "1.5"),
            (3, 4),
            np.zeros(3, int),
            {"label_smoothing": 1.5},
        ),
        (
            ArgumentError,
            ("reduction", '"mean"', "'max'"),
            (3, 4),
            np.zeros(3, int),
            {"reduction": "max"},
        ),
    ],
)
def test_wrong_arguments_are_refused(backend: Here, kind, words, logits, target, options):
    options = {
        name: backend.array(v) if isinstance(v, np.ndarray) else v for name, v in options.items()
    }
    x, t = backend.array(np.ones(logits)), backend.array(target)
    refuses(
        kind, "softmax_cross_entropy: ", *words, call=lambda: softmax_cross_entropy(x, t, **options)
    )


def test_foreign_arrays_are_refused(backend: Here):
    labels, name = backend.array(np.array([0, 2])), "softmax_cross_entropy: "
    refuses_mixed(backend, name, softmax_cross_entropy, normal(2, 3), np.array([0, 2]), dtype=False)
    refuses_mixed(
        backend,
        name,
        lambda x, w: softmax_cross_entropy(x, labels, weight=w),
        normal(2, 3),
        np.ones(3),
    )
    refuses_integers_and_lists(
        backend, name, lambda x: softmax_cross_entropy(x, labels), normal(2, 3)
    )
    x = backend.array(normal(2, 3))
    refuses(ArrayError, "expected an array", "list", call=lambda: softmax_cross_entropy(x, [0, 2]))


# --- cross-entropy on drawn configurations --------------------------------------------------------


def draw(rng: np.random.Generator) -> tuple:
    """(logits, target, weight, options)"""
    n, classes = int(rng.integers(0, 5)), int(rng.integers(1, 6))
    rest = tuple(
        int(v) for v in rng.integers(0 if rng.random() < 0.05 else 1, 4, size=rng.integers(0, 3))
    )
    logits = rng.standard_normal((n, classes, *rest)) * rng.choice([0.1, 1.0, 50.0, 1e4])
    options: dict[str, Any] = {
        "reduction": str(rng.choice(["mean", "sum", "none"])),
        "label_smoothing": float(rng.choice([0.0, 0.1, 1.0])),
    }
    kind = rng.choice(["indices", "one-hot", "soft"])
    if kind == "indices":
        target = rng.integers(0, classes, (n, *rest))
        options["ignore_index"] = int(rng.choice([-100, 0, classes - 1]))
        if rng.random() < 0.5:
            target = np.where(
                rng.random(target.shape) < rng.choice([0.3, 1.0]), options["ignore_index"], target
            )
    else:
        target = rng.random(logits.shape)
        if kind == "one-hot":
            target = (target == target.max(axis=1, keepdims=True)).astype("float64")
    weight = rng.random(classes) * (rng.random(classes) < 0.9) if rng.random() < 0.5 else None
    return logits, target, weight, options


def compare(here: Here, count: int, seed: int) -> None:
    import torch

    rng = np.random.default_rng(seed)
    for number in range(count):
        logits, target, weight, options = draw(rng)
        leaf = torch.tensor(logits, requires_grad=True)
        expected = torch.nn.functional.cross_entropy(
            leaf,
            torch.tensor(target),
            weight=None if weight is None else torch.tensor(weight),
            **options,
        )
        dy = rng.standard_normal(expected.shape)
        expected.backward(torch.tensor(dy))
        x = here.array(logits)
        try:
            loss, cache = ops.softmax_cross_entropy(
                x,
                here.array(target),
                weight=None if weight is None else here.array(weight),
                **options,
            )
            agree(here, here.xp.asarray(loss), expected.detach().numpy(), x, 1e-9)
            gradient = leaf.grad.numpy()
            if np.isfinite(expected.detach().numpy()).all():
                agree(
                    here,
                    ops.softmax_cross_entropy_backward(here.array(dy), cache),
                    gradient,
                    x,
                    1e-9,
                )
            else:  # the mean over nothing: a gradient that is not NaN in PyTorch is not NaN here
                got = here.host(ops.softmax_cross_entropy_backward(here.array(dy), cache))
                assert not np.isnan(got[~np.isnan(gradient)]).any()
        except BaseException as error:
            error.add_note(
                f"configuration {number}: {logits.shape} {target!r} {weight!r} {options}"
            )
            raise


@needs("torch")
def test_cross_entropy_on_drawn_configurations(backend: Here):
    compare(backend, 150, seed=0)


@needs("torch")
@pytest.mark.slow
def test_cross_entropy_on_thousands_of_configurations(backend: Here):
    compare(backend, 3000, seed=1)


def test_cross_entropy_where_no_label_counts(backend: Here):
    x, labels = backend.array(normal(3, 4)), backend.array(np.full(3, -100))
    loss, cache = ops.softmax_cross_entropy(x, labels)
    assert np.isnan(backend.host(loss))
    agree(backend, ops.softmax_cross_entropy_backward(1.0, cache), np.zeros((3, 4)), x)


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "int64"])
def test_cross_entropy_takes_every_integer(backend: Here, kind: str):
    x = backend.array(normal(3, 300))
    expected, _ = ops.softmax_cross_entropy(x, backend.array(np.array([0, 127, 5])))
    loss, _ = ops.softmax_cross_entropy(x, backend.array(np.array([0, 127, 5], dtype=kind)))
    agree(backend, backend.xp.asarray(loss), backend.host(expected), x)


def test_ignore_index_is_for_indices(backend: Here):
    x = backend.array(normal(3, 4))
    refuses(
        ArgumentError,
        "ignore_index",
        "distribution",
        call=lambda: ops.softmax_cross_entropy(x, x, ignore_index=0),
    )
