"""Losses as values, and their means, gradients and parts, against PyTorch in float64."""

import json
import pickle
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pytest

from portacnn import Trainer, load_mnist_sample, losses, ops
from portacnn.errors import ArgumentError, ArrayError, ModelFormatError, ShapeError
from portacnn.layers import Flatten, Linear, ReLU
from portacnn.losses import (
    L1,
    MSE,
    BCEWithLogits,
    CenterDetection,
    CrossEntropy,
    Dice,
    Focal,
    Huber,
    Loss,
    NTXent,
    SmoothL1,
    Sum,
    Triplet,
)
from portacnn.models import Model
from portacnn.runtime import backend_of
from support.checks import agree, normal, refuses
from support.matrix import Here, needs

CLASSES = np.array([0, 2, 1, 2, 2, 0])
MAPS = np.random.default_rng(0).integers(0, 3, (6, 2, 4)).astype("uint8")
MAPS[0], MAPS[1, 1, 2:] = 255, 255
SHARES = np.random.default_rng(1).dirichlet([1.0, 1.0, 1.0], 6)
LABELS = np.random.default_rng(2).integers(0, 2, (6, 3)).astype("uint8")
VALUES = normal(6, 3, seed=3)
CENTERS = normal(6, 5, 2, 4, seed=4)
CENTERS[:, 0] = MAPS % 3 * (MAPS < 255)  # of the first image, all is background
WEIGHT = np.array([1.0, 0.5, 2.0, 0.0, 3.0, 0.25])

CASES: dict[str, tuple[Loss, np.ndarray, tuple[int, ...]]] = {
    "cross entropy": (CrossEntropy(), CLASSES, (3,)),
    "smoothed": (CrossEntropy(label_smoothing=0.2), CLASSES, (3,)),
    "class weights": (CrossEntropy(weight=[0.5, 2.0, 1.0]), CLASSES, (3,)),
    "a weight of 0": (CrossEntropy(weight=[0.0, 2.0, 1.0]), CLASSES, (3,)),
    "ignored": (CrossEntropy(ignore_index=2, label_smoothing=0.1), CLASSES, (3,)),
    "maps": (CrossEntropy(weight=[1, 2, 3], ignore_index=255), MAPS, (3, 2, 4)),
    "shares": (CrossEntropy(weight=[1, 2, 3]), SHARES, (3,)),
    "bce": (BCEWithLogits(), LABELS, (3,)),
    "pos_weight": (BCEWithLogits(pos_weight=[1, 2, 3]), LABELS, (3,)),
    "bce of masks": (BCEWithLogits(pos_weight=4), MAPS[:, None] % 2, (1, 2, 4)),
    "mse": (MSE(), VALUES, (3,)),
    "l1": (L1(), VALUES, (3,)),
    "huber": (Huber(0.4), VALUES, (3,)),
    "smooth l1": (SmoothL1(0.4), VALUES, (3,)),
    "focal": (Focal(alpha=[1, 2, 3]), CLASSES, (3,)),
    "focal of maps": (Focal(gamma=1.0, ignore_index=255), MAPS, (3, 2, 4)),
    "focal of labels": (Focal(alpha=0.25, multilabel=True), LABELS, (3,)),
    "dice": (Dice(ignore_index=255), MAPS, (3, 2, 4)),
    "dice of masks": (Dice(multilabel=True), MAPS[:, None] % 2, (1, 2, 4)),
    "centers": (CenterDetection(box_weight=1.5), CENTERS, (3 + 4, 2, 4)),
    "sum": (0.5 * CrossEntropy(weight=[1, 2, 3], ignore_index=255) + Dice(ignore_index=255),
            MAPS, (3, 2, 4)),
}  # fmt: skip
EACH = pytest.mark.parametrize("name", CASES)


def each_loss(loss: Loss, y: Any, t: np.ndarray) -> tuple[Any, Any]:
    """For every sample, PyTorch's sum of what is counted, and how much is counted; (N,) each."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    F = torch.nn.functional

    def flat(a: Any) -> Any:
        return a.reshape(len(a), -1)

    if isinstance(loss, CrossEntropy):
        weight = None if loss.weight is None else torch.tensor(loss.weight).double()
        shares = t.dtype.kind == "f"
        ignored = -100 if loss.ignore_index is None else loss.ignore_index
        target = torch.tensor(t if shares else t.astype("int64"))
        each = F.cross_entropy(
            y, target, weight, ignore_index=ignored, label_smoothing=loss.label_smoothing,
            reduction="none",
        )  # fmt: skip
        by_class = torch.ones(256).double()
        if weight is not None and not shares:
            by_class[: len(weight)] = weight
        counted = torch.ones(each.shape).double()
        if not shares:
            counted = by_class[target] * (target != ignored)
        return flat(each).sum(1), flat(counted).sum(1)
    if isinstance(loss, Focal) and not loss.multilabel:
        ignored = -100 if loss.ignore_index is None else loss.ignore_index
        target = torch.tensor(t.astype("int64"))
        counted = (target != ignored).double()
        inside = torch.where(target == ignored, 0, target)
        log_p = F.log_softmax(y, 1).gather(1, inside.unsqueeze(1)).squeeze(1)
        alpha = torch.tensor(loss.alpha or (1.0, 1.0, 1.0)).double()[inside]
        each = -alpha * counted * (1 - log_p.exp()) ** loss.gamma * log_p
        return flat(each).sum(1), flat(counted).sum(1)
    if isinstance(loss, Dice):
        p = y.sigmoid() if loss.multilabel else y.softmax(1)
        if loss.multilabel:
            masks = torch.tensor(t).double()
        else:
            masks = torch.tensor(np.moveaxis(np.eye(256)[t], -1, 1)[:, :3])
            p = p * torch.tensor((t != 255)[:, None])
        axes = (2, 3)
        share = (2 * (p * masks).sum(axes) + 1) / (p.sum(axes) + masks.sum(axes) + 1)
        return (1 - share).mean(1), torch.ones(len(t)).double()
    target = torch.tensor(t).double()
    if isinstance(loss, CenterDetection):
        has = (target[:, 0] > 0).double()
        of_class = F.cross_entropy(y[:, :3], target[:, 0].long(), reduction="none")
        of_box = (y[:, 3:] - target[:, 1:]).abs().mean(1) * has
        return flat(of_class + 1.5 * of_box).sum(1), flat(has).sum(1)
    functions = {
        MSE: lambda: F.mse_loss(y, target, reduction="none"),
        L1: lambda: F.l1_loss(y, target, reduction="none"),
        Huber: lambda: F.huber_loss(y, target, reduction="none", delta=loss.delta),
        SmoothL1: lambda: F.smooth_l1_loss(y, target, reduction="none", beta=loss.beta),
        BCEWithLogits: lambda: F.binary_cross_entropy_with_logits(
            y,
            target,
            reduction="none",
            pos_weight=loss.pos_weight and torch.tensor(loss.pos_weight).double(),
        ),
        Focal: lambda: (
            (target * loss.alpha + (1 - target) * (1 - loss.alpha))
            * (target * (-y).sigmoid() ** 2 + (1 - target) * y.sigmoid() ** 2)
            * F.binary_cross_entropy_with_logits(y, target, reduction="none")
        ),
    }
    each = flat(functions[type(loss)]())
    return each.sum(1), torch.full((len(t),), float(each.shape[1])).double()


def expected(loss: Loss, host: np.ndarray, t: np.ndarray, weight: Any) -> tuple[float, np.ndarray]:
    """The weighted mean and its gradient, from PyTorch's functions and autograd."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    y = torch.tensor(host, requires_grad=True)
    by_sample = torch.ones(len(t)).double() if weight is None else torch.tensor(weight)
    total = 0.0
    for factor, term in loss.terms if isinstance(loss, Sum) else ((1.0, loss),):
        each, counted = each_loss(term, y, t)
        total = total + factor * (by_sample * each).sum() / (by_sample * counted).sum()
    total.backward()
    return float(total.detach()), y.grad.numpy()


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["alike", "weighted"])
@EACH
@needs("torch")
def test_mean_and_gradient(backend: Here, name: str, weight: np.ndarray | None):
    loss, t, shape = CASES[name]
    host = 2 * normal(6, *shape)
    value, gradient = expected(loss, host, t, weight)
    for dtype, tolerance in (("float64", 1e-10), ("float32", 2e-5)):
        y = backend.array(host, dtype)
        ready = backend.array(loss.check_targets(t, shape, count=6, dtype=dtype))
        factors = None if weight is None else backend.array(weight, dtype)
        got, cache = loss.forward(y, ready, factors)
        agree(backend, backend.xp.asarray(got), value, y, tolerance)
        agree(backend, loss.backward(cache), gradient, y, tolerance)
        _, cache = loss.forward(y, ready, factors)
        agree(backend, loss.backward(cache, backend.array(0.5, dtype)), gradient / 2, y, tolerance)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["alike", "weighted"])
@EACH
@needs("torch")
def test_parts_add_up_to_the_whole(backend: Here, name: str, weight: np.ndarray | None):
    """With parts that count differently; of the maps, the first part counts nothing at all."""
    loss, t, shape = CASES[name]
    host = 2 * normal(6, *shape)
    y, ready = backend.array(host), backend.array(loss.check_targets(t, shape, dtype="float64"))
    factors = None if weight is None else backend.array(weight)
    whole = loss.count(ready, factors, "float64")
    total: Any = 0.0
    gradients = []
    for first, last in ((0, 1), (1, 3), (3, 6)):
        own = None if factors is None else factors[first:last]
        part, saved = loss.forward_part(y[first:last, ...], ready[first:last, ...], own, whole)
        total = total + part
        gradients.append(backend.host(loss.backward_part(saved)))
    value, gradient = expected(loss, host, t, weight)
    agree(backend, backend.xp.asarray(total), value, y, 1e-10)
    np.testing.assert_allclose(np.concatenate(gradients), gradient, rtol=1e-9, atol=1e-12)


def test_the_default_is_the_fused_op_to_the_bit(backend: Here):
    """A training that says nothing of its loss does what it did: the op's mean, and for parts its
    gradient for their share of the images as a Python number."""
    y, t = backend.array(normal(7, 5), "float32"), backend.array(np.arange(7) % 5)
    loss = CrossEntropy(label_smoothing=0.1)
    whole = loss.count(t)
    assert whole == 7
    assert not hasattr(whole, "shape")
    total: Any = 0.0
    before: Any = 0.0
    for first, last in ((0, 4), (4, 7)):
        x, labels = y[first:last, :], t[first:last]
        mean, cache = ops.softmax_cross_entropy(x, labels, label_smoothing=0.1)
        share = (last - first) / 7
        before = before + share * mean
        part, saved = loss.forward_part(x, labels, None, whole)
        total = total + part
        np.testing.assert_array_equal(
            backend.host(loss.backward_part(saved)),
            backend.host(ops.softmax_cross_entropy_backward(share, cache)),
        )
    assert backend.host(backend.xp.asarray(total)) == backend.host(backend.xp.asarray(before))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "loss", [CrossEntropy(ignore_index=1), Focal(ignore_index=1), Dice(ignore_index=1)], ids=repr
)
def test_a_batch_in_which_nothing_counts(backend: Here, loss: Loss, weighted: bool):
    y, t = backend.array(normal(2, 3, 2, 2)), backend.array(np.ones((2, 2, 2), "uint8"))
    weight = backend.array(np.ones(2)) if weighted else None
    mean, cache = loss.forward(y, t, weight)
    if not isinstance(loss, Dice):  # Dice of nothing is 1 - smooth/smooth, too
        agree(backend, backend.xp.asarray(mean), 0.0, y)
    agree(backend, loss.backward(cache), np.zeros((2, 3, 2, 2)), y)
    part, saved = loss.forward_part(y, t, weight, loss.count(t, weight, "float64"))
    agree(backend, backend.xp.asarray(part), 0.0, y)
    agree(backend, loss.backward_part(saved), np.zeros((2, 3, 2, 2)), y)


@EACH
def test_all_weights_zero(backend: Here, name: str):
    loss, t, shape = CASES[name]
    y, ready = backend.array(normal(6, *shape)), backend.array(loss.check_targets(t, shape))
    if ready.dtype == backend.xp.float32:
        ready = backend.xp.astype(ready, backend.xp.float64)
    mean, cache = loss.forward(y, ready, backend.array(np.zeros(6)))
    agree(backend, backend.xp.asarray(mean), 0.0, y)
    agree(backend, loss.backward(cache), np.zeros((6, *shape)), y)


@pytest.mark.parametrize("loss", [NTXent(0.5), Triplet(), Triplet(triplets="hardest")], ids=repr)
def test_embeddings(backend: Here, loss: Loss):
    """Weights are those of the anchors; the op's own tests compare with PyTorch."""
    y = backend.array(normal(6, 4))
    t = backend.array(loss.check_targets([0, 0, 1, 1, 2, 9], (4,)))
    ones, cache = loss.forward(y, t, backend.array(np.ones(6)))
    plain, _ = loss.forward(y, t)
    agree(backend, backend.xp.asarray(ones), backend.host(plain), y)
    assert tuple(loss.backward(cache).shape) == (6, 4)


def test_triplets_do_not_collapse():
    """From random weights, and at a usual learning rate, all embeddings may become equal."""
    (x, t), (x_test, t_test) = load_mnist_sample()
    model = Model(Flatten(), Linear(None, 32), ReLU(), Linear(None, 8)).build((1, 28, 28), seed=0)
    options = {"epochs": 2, "batch_size": 50, "lr": 0.01, "verbose": False}
    Trainer(model, x[:1000], t[:1000], loss="triplet", **options).train()
    found = model.predict(x_test[:200])
    distance = np.linalg.norm(found[:, None] - found, axis=2) + np.diag(np.full(200, np.inf))
    assert np.mean(t_test[distance.argmin(axis=1)] == t_test[:200]) > 0.5
    assert distance.min(axis=1).mean() > 0.05


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "loss",
    [*(loss for loss, _, _ in CASES.values()), NTXent(0.2), Triplet(0.2, "all")],
    ids=lambda loss: repr(loss),
)
def test_described_pickled_compared(loss: Loss):
    described = json.loads(json.dumps(losses.describe_loss(loss)))
    again = losses.rebuild_loss(described)
    assert again == loss == pickle.loads(pickle.dumps(loss))
    assert hash(again) == hash(loss)
    assert losses.named(loss) is loss


def test_words():
    assert losses.named("cross_entropy") == CrossEntropy()
    assert losses.named("dice") == Dice()
    assert 2 * (MSE() + 0.5 * L1()) == Sum(((2.0, MSE()), (1.0, L1())))
    refuses(ArgumentError, "'nll'", "cross_entropy", "mse", call=lambda: losses.named("nll"))
    refuses(ArgumentError, "factor", call=lambda: -1 * MSE())
    with pytest.raises(TypeError):
        MSE() + 1  # type: ignore[operator]
    refuses(
        ModelFormatError, "Own", call=lambda: losses.rebuild_loss({"class": "Own", "arguments": {}})
    )


@pytest.mark.parametrize(
    ("words", "make"),
    [
        (("weight", "above 0"), lambda: CrossEntropy(weight=[0.0, 0.0])),
        (("weight", "-1"), lambda: CrossEntropy(weight=[1.0, -1.0])),
        (("label_smoothing",), lambda: CrossEntropy(label_smoothing=2)),
        (("ignore_index", "1.5"), lambda: CrossEntropy(ignore_index=1.5)),  # type: ignore[arg-type]
        (("gamma",), lambda: Focal(gamma=-1.0)),
        (("ignore_index", "multilabel"), lambda: Dice(multilabel=True, ignore_index=3)),
        (("delta",), lambda: Huber(delta=0)),
        (("temperature",), lambda: NTXent(temperature=-1)),
        (("triplets", "'easy'"), lambda: Triplet(triplets="easy")),
        (("(factor, loss)",), lambda: Sum([MSE()])),  # type: ignore[list-item]
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_options(words: tuple[str, ...], make: Any):
    refuses(ArgumentError, *words, call=make)


def test_half_precision_and_weights_are_refused(backend: Here):
    y, t = backend.array(normal(3, 2), "float32"), backend.array(np.array([0, 1, 0]))
    weights = backend.array(np.ones(2), "float32")
    refuses(ShapeError, "3 samples", "(2,)", call=lambda: CrossEntropy().forward(y, t, weights))
    refuses(ShapeError, "3 samples", call=lambda: MSE().forward(y, y, weights))
    doubles = backend.array(np.ones(3))
    refuses(ArrayError, "float32", call=lambda: MSE().forward(y, y, doubles))
    if backend.backend.name != "array_api_strict":
        half = backend.xp.astype(y, backend.xp.float16)
        for loss in (CrossEntropy(), Focal(), NTXent(), Triplet()):
            refuses(ArrayError, "float16", "convert", call=lambda loss=loss: loss.forward(half, t))
        refuses(ArrayError, "float16", call=lambda: MSE().forward(half, half))


# --- one of your own ------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogCosh(Loss):
    def forward(self, y: Any, t: Any, weight: Any = None) -> tuple[Any, Any]:
        xp = backend_of(y).xp
        each = self.weighted(weight, y) * xp.log(xp.cosh(y - t))
        return xp.mean(each), (y, t, weight)

    def backward(self, cache: Any, dloss: Any = 1.0) -> Any:
        y, t, weight = cache
        xp = backend_of(y).xp
        return self.weighted(weight, y) * xp.tanh(y - t) * (dloss / prod(y.shape))


def test_one_of_your_own(backend: Here):
    host, t = normal(6, 3), VALUES
    y, target, weight = (backend.array(a) for a in (host, t, WEIGHT))
    mean, cache = LogCosh().forward(y, target, weight)
    factors = WEIGHT[:, None] / WEIGHT.sum() / 3
    agree(backend, backend.xp.asarray(mean), (factors * np.log(np.cosh(host - t))).sum(), y)
    agree(backend, LogCosh().backward(cache), factors * np.tanh(host - t), y)
    both = LogCosh() + 2 * MSE()
    whole = both.count(target, weight, "float64")
    parts = [
        both.forward_part(y[a:b, :], target[a:b, :], weight[a:b], whole)
        for a, b in ((0, 2), (2, 6))
    ]
    total, _ = both.forward(y, target, weight)
    agree(backend, backend.xp.asarray(parts[0][0] + parts[1][0]), backend.host(total), y)
    refuses(ArgumentError, "LogCosh", "file", call=lambda: losses.describe_loss(LogCosh()))
    np.testing.assert_array_equal(LogCosh().check_targets(t, (3,)), t.astype("float32"))


# --- outputs --------------------------------------------------------------------------------------


def test_predictions_and_scores(backend: Here):
    host = np.array([[1.0, 3.0, 2.0], [np.nan, 5.0, 0.0], [-1.0, -2.0, -3.0]])
    y = backend.array(host)
    np.testing.assert_array_equal(backend.host(CrossEntropy().predictions(y)), [1, -1, 0])
    on = backend.host(BCEWithLogits().predictions(y))
    np.testing.assert_array_equal(on, [[1, 1, 1], [-1, 1, 0], [0, 0, 0]])
    surer = backend.host(BCEWithLogits().predictions(y, threshold=0.9))
    np.testing.assert_array_equal(surer, [[0, 1, 0], [-1, 1, 0], [0, 0, 0]])
    assert MSE().predictions(y) is y
    agree(backend, BCEWithLogits().scores(y[2:, :]), 1 / (1 + np.exp(-host[2:])), y)
    agree(backend, CrossEntropy().scores(y[2:, :]), np.exp(host[2:]) / np.exp(host[2:]).sum(), y)
