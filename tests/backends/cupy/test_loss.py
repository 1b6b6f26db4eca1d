"""The CUDA kernels of softmax cross-entropy, run on the host, against sums in float64, sample by
sample."""

from math import exp, log
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn.backends.cupy import loss as cupy_loss
from portacnn.ops.loss import softmax_cross_entropy
from support.cuda_rig import close, needs_compiler, orders, rigged
from support.drawing import arguments_of

pytestmark = needs_compiler


def wanted(
    logits: np.ndarray, labels: np.ndarray, smoothing: float, ignored: int
) -> tuple[np.ndarray, ...]:
    """The mean loss of the labels that are not ignored, and its gradient; and for each what its
    rounding is measured by.

    A sample's loss has the logarithm of a sum of 1 or more in it, which is off by that sum's
    rounding.
    """
    n, classes = logits.shape
    counting = [i for i in range(n) if labels[i] != ignored]
    total, gradient, terms = 0.0, np.zeros(logits.shape), np.zeros(logits.shape)
    for i in counting:
        row = [float(value) for value in logits[i]]
        top = max(row)
        norm = top + log(sum(exp(value - top) for value in row))
        for c in range(classes):
            q = smoothing / classes + (1 - smoothing) * (c == labels[i])
            total += q * (norm - row[c])
            gradient[i, c] = (exp(row[c] - norm) - q) / len(counting)
            terms[i, c] = (exp(row[c] - norm) + q) / len(counting)
    loss = np.array(total / len(counting) if counting else np.nan)
    return loss, gradient, np.fmax(loss, 1.0), terms


@settings(max_examples=30)
@given(
    arguments_of("softmax_cross_entropy of labels", "small"),
    st.tuples(*[st.booleans()] * 2),
    st.sampled_from(["float32", "float64"]),
    orders,
    st.integers(0, 99),
)
def test_softmax_cross_entropy(arguments, flags, dtype, order, seed):
    last, far = flags
    (n, classes), counted = arguments["logits"].shape, str(arguments["target"].dtype)
    smoothing, ignored = arguments["label_smoothing"], arguments["ignore_index"]
    draw = np.random.default_rng(seed)
    options: dict[str, Any] = {"ignore_index": ignored, "label_smoothing": smoothing}
    with rigged(order, seed) as rig:
        logits = rig.array(
            draw.normal(500.0 if far else 0.0, 4, (n, classes)), dtype, (1, 0) if last else None
        )
        labels = rig.array(draw.integers(0, classes, n), counted)
        loss, saved = cupy_loss.softmax_cross_entropy(logits, labels, **options)
        want, gradient, *terms = wanted(logits, labels, smoothing, ignored)
        launches = len(rig.launches)
        assert launches == (2 if n == 1100 else 1)
        close(loss, want, dtype, terms[0])
        dlogits = cupy_loss.softmax_cross_entropy_backward(1.0, saved)
        assert len(rig.launches) == launches
        close(dlogits, gradient, dtype, terms[1])
        close(
            cupy_loss.softmax_cross_entropy_backward(np.array(0.5, dtype), saved),
            gradient / 2,
            dtype,
            terms[1],
        )
        again, nothing = cupy_loss.softmax_cross_entropy(logits, labels, **options, keep=False)
        assert nothing is None
        np.testing.assert_array_equal(again, loss)


@pytest.mark.parametrize("classes", [10, 700, 2500])
@pytest.mark.parametrize("last", [False, True])
def test_several_blocks_and_many_classes(classes: int, last: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cupy_loss, "FULL", 5)  # fewer blocks than there is work for
    monkeypatch.setattr(cupy_loss, "_ROUNDS", 0)
    n = 1500 if classes == 10 else 9
    host = np.random.default_rng(0).normal(size=(n, classes))
    results = []
    for order in ("forward", "reverse", "shuffled"):
        with rigged(order) as rig:
            logits = rig.array(host, "float32", (1, 0) if last else None)
            labels = rig.array(np.arange(n) * 7 % classes, "int64")
            loss, saved = cupy_loss.softmax_cross_entropy(logits, labels, label_smoothing=0.2)
            assert [name for name, *_ in rig.launches] == ["softmax_loss", "softmax_gradient"]
            want, gradient, *terms = wanted(logits, labels, 0.2, -100)
            close(loss, want, "float32", terms[0])
            close(saved, gradient, "float32", terms[1])
            assert (
                cupy_loss.softmax_cross_entropy(logits, labels, label_smoothing=0.2, keep=False)[0]
                == loss
            )
            results.append((loss, saved))
    for loss, saved in results[1:]:
        assert loss == results[0][0]
        np.testing.assert_array_equal(saved, results[0][1])


@pytest.mark.parametrize("wrong", [-1, 4, -100, 2**40])
@pytest.mark.parametrize("blocks", [0, 4])
def test_a_label_out_of_range_makes_the_loss_nan(
    wrong: int, blocks: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cupy_loss, "_ROUNDS", blocks)
    with rigged() as rig:
        logits = rig.array(np.random.default_rng(0).normal(size=(300, 4)), "float32")
        labels = np.arange(300) % 4
        labels[17] = wrong
        loss, saved = cupy_loss.softmax_cross_entropy(logits, rig.array(labels, "int64"))
        assert np.isnan(loss) == (wrong != -100)
        assert np.isfinite(saved).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_gradient_beside_a_label_out_of_range(smoothing: float):
    """As of the portable op: what smoothing spreads is asked for all the same, and the label isn't
    counted."""
    labels = np.array([1, 9, -2, 3, 7])
    with rigged() as rig:
        logits = rig.array(np.random.default_rng(0).normal(size=(5, 4)), "float64")
        options: dict[str, Any] = {"label_smoothing": smoothing, "ignore_index": 7}
        _, saved = cupy_loss.softmax_cross_entropy(logits, rig.array(labels, "int64"), **options)
        loss, kept = softmax_cross_entropy.forward(np.array(logits), labels, **options)
        assert np.isnan(loss)
        np.testing.assert_allclose(
            saved, softmax_cross_entropy.portable_backward(1.0, kept), atol=1e-14
        )


def test_nothing_that_counts():
    """As in PyTorch: the mean over nothing is NaN, its gradient 0."""
    with rigged() as rig:
        logits, labels = rig.array(np.ones((3, 4)), "float32"), rig.array(np.full(3, 2), "int64")
        loss, saved = cupy_loss.softmax_cross_entropy(logits, labels, ignore_index=2)
        assert np.isnan(loss)
        np.testing.assert_array_equal(saved, np.zeros((3, 4)))


def test_infinities():
    """A class of logit -inf costs nothing where it isn't asked for; asked for, infinitely much."""
    host = np.array([[0.0, -np.inf, 0.0]] * 2)
    with rigged() as rig:
        logits = rig.array(host, "float32")
        loss, saved = cupy_loss.softmax_cross_entropy(logits, rig.array(np.array([0, 2]), "int64"))
        np.testing.assert_allclose(loss, log(2), rtol=1e-6)
        np.testing.assert_allclose(saved, [[-0.25, 0, 0.25], [0.25, 0, -0.25]], atol=1e-7)
        assert (
            cupy_loss.softmax_cross_entropy(logits, rig.array(np.array([0, 1]), "int64"))[0]
            == np.inf
        )
        nan = rig.array(np.array([[0.0, np.nan, 1.0]]), "float32")
        assert np.isnan(cupy_loss.softmax_cross_entropy(nan, rig.array(np.array([0]), "int64"))[0])


def test_what_is_declined():
    with rigged() as rig:
        logits, labels = rig.array(np.ones((3, 4)), "float32"), rig.array(np.zeros(3), "int64")
        loss = cupy_loss.softmax_cross_entropy
        assert loss(logits, labels, weight=logits[0]) is NotImplemented
        assert loss(logits, labels, reduction="sum") is NotImplemented
        assert loss(logits, labels, reduction="none") is NotImplemented
        assert loss(logits, logits) is NotImplemented
        assert (
            loss(rig.array(np.ones((3, 4, 5)), "float32"), rig.array(np.zeros((3, 5)), "int64"))
            is NotImplemented
        )
        assert loss(rig.array(np.ones((3, 4)), "float16"), labels) is NotImplemented
        assert loss(rig.array(np.ones((0, 4)), "float32"), labels[:0]) is NotImplemented
