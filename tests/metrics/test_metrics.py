"""Metrics against scikit-learn on drawn data, cut into drawn batches, on every backend."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import losses, metrics
from portacnn.errors import ArgumentError, ModelFormatError, ShapeError
from support.checks import refuses
from support.matrix import EACH_LIBRARY, Here, backends

sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the oracle")
CROSS = losses.CrossEntropy()
BCE = losses.BCEWithLogits()


def measured(here: Here, metric: Any, y: np.ndarray, t: np.ndarray, size: int) -> Any:
    """The metric over batches of ``size``; computed twice, which changes nothing."""
    for first in range(0, len(y), size):
        last = min(first + size, len(y))
        metric.update(here.array(y[first:last]), here.array(t[first:last]))
    value = metric.compute()
    np.testing.assert_equal(metric.compute(), value)
    return value


def theirs(function: Any, *args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that do not occur
        return function(*args, **options)


def with_ties(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype("float32") / 2


draws = given(
    seed=st.integers(0, 10**6), n=st.integers(1, 40), c=st.integers(2, 6), size=st.integers(1, 45)
)


# --- classes --------------------------------------------------------------------------------------


@EACH_LIBRARY
@settings(max_examples=6)
@draws
def test_classes(backend: Here, seed: int, n: int, c: int, size: int):
    rng = np.random.default_rng(seed)
    y, t = with_ties(rng, n, c), rng.integers(0, c, n)
    p = y.argmax(1)
    expected: dict[str, Any] = {
        "accuracy": sk.accuracy_score(t, p),
        "balanced_accuracy": theirs(sk.balanced_accuracy_score, t, p),
    }
    for word, function in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
        ("mean_iou", sk.jaccard_score),
    ):
        expected[word] = theirs(function, t, p, average="macro")
        kind = type(metrics.named(word))
        for average in ("micro", "none"):
            given = {"average": None if average == "none" else average, "labels": np.arange(c)}
            got = measured(backend, kind(average=average), y, t, size)
            np.testing.assert_allclose(got, theirs(function, t, p, **given), atol=1e-12)
    expected["dice"] = expected["f1"]
    expected["confusion_matrix"] = sk.confusion_matrix(t, p, labels=np.arange(c)).tolist()
    for word, value in expected.items():
        got = measured(backend, metrics.named(word, CROSS), y, t, size)
        np.testing.assert_allclose(got, value, atol=1e-12, err_msg=word)
    for k in range(1, c):
        # of equal outputs theirs takes the last, so the classes go in backwards
        value = sk.top_k_accuracy_score(
            c - 1 - t, y[:, ::-1], k=k, labels=np.arange(c)
        ) if c > 2 else sk.accuracy_score(t, p)  # fmt: skip
        got = measured(backend, metrics.named(f"top{k}", CROSS), y, t, size)
        assert got == pytest.approx(value), k


@EACH_LIBRARY
@settings(max_examples=6)
@draws
def test_labels(backend: Here, seed: int, n: int, c: int, size: int):
    rng = np.random.default_rng(seed)
    y, t = with_ties(rng, n, c), rng.integers(0, 2, (n, c)).astype("uint8")
    p = (y > 0).astype(int)
    expected: dict[str, Any] = {"accuracy": 1 - sk.hamming_loss(t, p)}
    for word, function in (
        ("precision", sk.precision_score),
        ("recall", sk.recall_score),
        ("f1", sk.f1_score),
        ("mean_iou", sk.jaccard_score),
    ):
        expected[word] = theirs(function, t, p, average="macro")
        got = measured(
            backend, type(metrics.named(word))("multilabel", average="micro"), y, t, size
        )
        np.testing.assert_allclose(got, theirs(function, t, p, average="micro"), atol=1e-12)
    each = [theirs(sk.balanced_accuracy_score, t[:, k], p[:, k]) for k in range(c)]
    expected["balanced_accuracy"] = np.mean(each)
    for word, value in expected.items():
        got = measured(backend, metrics.named(word, BCE), y, t, size)
        np.testing.assert_allclose(got, value, atol=1e-12, err_msg=word)
    got = measured(backend, metrics.Accuracy("multilabel", subset=True), y, t, size)
    assert got == pytest.approx(sk.accuracy_score(t, p))
    one = measured(backend, metrics.F1("multilabel", average="binary"), y[:, :1], t[:, :1], size)
    assert one == pytest.approx(theirs(sk.f1_score, t[:, 0], p[:, 0], average="binary"))


@EACH_LIBRARY
@settings(max_examples=6)
@draws
def test_roc_auc(backend: Here, seed: int, n: int, c: int, size: int):
    rng = np.random.default_rng(seed)
    y, t = with_ties(rng, n, c), rng.integers(0, 2, (n, c))
    got = measured(backend, metrics.RocAuc("multilabel", average="none"), y, t, size)
    expected = [
        theirs(sk.roc_auc_score, t[:, k], y[:, k]) if 0 < t[:, k].sum() < n else np.nan
        for k in range(c)
    ]
    np.testing.assert_allclose(got, expected, atol=1e-12)
    labels = np.concatenate([np.arange(c), rng.integers(0, c, n)])
    y = rng.standard_normal((len(labels), c))
    shares = np.exp(y) / np.exp(y).sum(1, keepdims=True)
    got = measured(backend, metrics.named("roc_auc", CROSS), y, labels, size)
    if c == 2:
        assert got == pytest.approx(sk.roc_auc_score(labels, y[:, 1] - y[:, 0]))
    else:
        assert got == pytest.approx(sk.roc_auc_score(labels, shares, multi_class="ovr"))


def test_two_classes_far_apart_still_rank(backend: Here):
    """Where a softmax or a sigmoid in float32 is 1 for all."""
    y = np.array([[0, 40.0], [0, 50.0], [0, 60.0], [0, 70.0]], "float32")
    assert measured(backend, metrics.named("roc_auc", CROSS), y, np.array([0, 0, 1, 1]), 2) == 1.0
    labels = np.array([[0], [0], [1], [1]], "uint8")
    assert measured(backend, metrics.named("roc_auc", BCE), y[:, 1:], labels, 2) == 1.0


def test_maps_and_what_is_ignored(backend: Here):
    rng = np.random.default_rng(0)
    y, t = rng.standard_normal((5, 3, 4, 6)), rng.integers(0, 3, (5, 4, 6)).astype("uint8")
    t[0, :2], t[3, 1, 1] = 255, 255
    seen = t != 255
    true, p = t[seen], y.argmax(1)[seen]
    loss = losses.CrossEntropy(ignore_index=255)
    for word, value in {
        "pixel_accuracy": sk.accuracy_score(true, p),
        "mean_iou": sk.jaccard_score(true, p, average="macro"),
        "dice": sk.f1_score(true, p, average="macro"),
        "confusion_matrix": sk.confusion_matrix(true, p),
        "top2": sk.top_k_accuracy_score(true, y.transpose(0, 2, 3, 1)[seen], k=2),
    }.items():
        got = measured(backend, metrics.named(word, loss), y, t, 2)
        np.testing.assert_allclose(got, value, atol=1e-12, err_msg=word)
    masks = rng.integers(0, 2, (5, 3, 4, 6)).astype("uint8")
    got = measured(backend, metrics.named("mean_iou", BCE), y, masks, 2)
    flat = [a.transpose(0, 2, 3, 1).reshape(-1, 3) for a in (masks, y > 0)]
    assert got == pytest.approx(sk.jaccard_score(*flat, average="macro"))


def test_nan_is_wrong_and_never_class_0(backend: Here):
    y, t = np.array([[np.nan, 1.0], [2.0, np.nan], [3.0, 1.0]]), np.array([0, 0, 0])
    for word, value in {
        "accuracy": 1 / 3,
        "recall": 1 / 3,
        "precision": 1.0,
        "balanced_accuracy": 1 / 3,
        "top1": 1 / 3,
        "top2": 1 / 3,
        "confusion_matrix": [[1, 0], [0, 0]],
    }.items():
        got = measured(backend, metrics.named(word, CROSS), y, t, 3)
        np.testing.assert_allclose(got, value, err_msg=word)
    labels = np.array([[0, 1], [1, 0], [1, 0]], "uint8")
    assert measured(backend, metrics.named("accuracy", BCE), y, labels, 3) == pytest.approx(3 / 6)
    precision = metrics.Precision("multilabel", average="none")
    assert measured(backend, precision, y, labels, 3) == [2 / 3, 1 / 3]
    y = np.array([[0.0, 1.0], [0.0, np.nan], [0.0, 2.0]])
    assert measured(backend, metrics.named("roc_auc", CROSS), y, np.array([0, 1, 1]), 2) == 0.5


# --- values ---------------------------------------------------------------------------------------


@settings(max_examples=6)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 40),
    k=st.integers(1, 3),
    size=st.integers(1, 45),
    shift=st.sampled_from([0.0, 1e4]),
)
def test_values_are_correct(backend: Here, seed: int, n: int, k: int, size: int, shift: float):
    rng = np.random.default_rng(seed)
    t = (rng.standard_normal((n, k)) + shift).astype("float32")
    y = (t + rng.standard_normal((n, k))).astype("float32")
    for word, function in (
        ("mae", sk.mean_absolute_error),
        ("rmse", sk.root_mean_squared_error),
        ("r2", sk.r2_score),
    ):
        metric = metrics.named(word, losses.MSE())
        value = theirs(function, t.astype("float64"), y.astype("float64"))
        got = measured(backend, metric, y, t, size)
        np.testing.assert_allclose(got, value, rtol=1e-9, err_msg=word)
        if k == 1:
            metric.reset()
            assert measured(backend, metric, y, t[:, 0], size) == pytest.approx(got, nan_ok=True)
            metric.reset()
            assert measured(backend, metric, y[:, 0], t[:, 0], 7) == pytest.approx(got, nan_ok=True)


def test_targets_that_are_all_alike(backend: Here):
    t = np.full((4, 1), 0.1, "float32")
    assert measured(backend, metrics.R2(), t, t, 2) == 1.0
    assert measured(backend, metrics.R2(), t + 1, t, 2) == 0.0
    assert np.isnan(measured(backend, metrics.MAE(), t * np.nan, t, 2))


def test_many_batches(backend: Here):
    """More than are kept apart."""
    y = np.arange(600, dtype="float32").reshape(-1, 1)
    metric = metrics.MAE()
    for n in range(600):
        metric.update(backend.array(y[n : n + 1]), backend.array(y[:1]))
    assert metric.compute() == 299.5


@backends(having="float16")
def test_half_precision_is_counted_in_float32(backend: Here):
    xp = backend.xp
    y = xp.astype(backend.array(np.full((4000, 1), 3.0)), xp.float16)
    assert measured_once(metrics.MAE(), y, y * 0.0) == 3.0
    both = xp.astype(backend.array(np.eye(2)), xp.float16)
    assert measured_once(metrics.Accuracy(), both, backend.array(np.arange(2))) == 1.0


def measured_once(metric: Any, y: Any, t: Any) -> Any:
    metric.update(y, t)
    return metric.compute()


# --- of all ---------------------------------------------------------------------------------------


def test_words_and_descriptions():
    for word in [*metrics.METRICS, "top3"]:
        metric = metrics.named(word)
        described = json.loads(json.dumps(metrics.describe_metric(metric)))
        assert metrics.rebuild_metric(described) == metric
        value = metric.compute()
        assert value == [] or np.isnan(value)
    own = metrics.F1(average="micro", threshold=0.25)
    bound = metrics.named(own, BCE)
    assert bound == metrics.F1("multilabel", average="micro", threshold=0.25)
    assert bound is not own
    boxes = metrics.AveragePrecision("coco")
    assert metrics.rebuild_metric(metrics.describe_metric(boxes)).iou == boxes.iou
    refuses(ArgumentError, "'auc'", "roc_auc", call=lambda: metrics.named("auc"))
    refuses(
        ArgumentError, "Accuracy", "MSE", "mae, rmse, r2",
        call=lambda: metrics.named("accuracy", losses.MSE()),
    )  # fmt: skip
    refuses(ArgumentError, "MAE", "multiclass", call=lambda: metrics.named("mae", CROSS))
    refuses(ArgumentError, "TopK", call=lambda: metrics.named("top5", BCE))
    refuses(ArgumentError, "average", call=lambda: metrics.F1(average="mean"))
    refuses(ArgumentError, "task", call=lambda: metrics.F1("binary"))
    refuses(
        ModelFormatError, "Own",
        call=lambda: metrics.rebuild_metric({"class": "Own", "arguments": {}}),
    )  # fmt: skip


def test_shapes_that_do_not_fit(backend: Here):
    y = backend.array(np.zeros((3, 2)))
    refuses(
        ShapeError, "Accuracy", "3x2", "(2,)", call=lambda: metrics.Accuracy().update(y, y[:2, 0])
    )
    refuses(ShapeError, "MAE", "(3, 1)", call=lambda: metrics.MAE().update(y, y[:, :1]))


def test_reset(backend: Here):
    y, t = backend.array(np.eye(2)), backend.array(np.array([1, 0]))
    for word in ("accuracy", "f1", "roc_auc"):
        metric = metrics.named(word, CROSS)
        metric.update(y, t)
        assert metric.compute() == 0.0
        metric.reset()
        metric.update(y, backend.array(np.array([0, 1])))
        assert metric.compute() == 1.0
