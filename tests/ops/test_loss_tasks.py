"""Losses of regression, detection, segmentation and embeddings against PyTorch's functions and
autograd in float64, and numerical gradients."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ArgumentError, LabelError, ShapeError
from support.checks import agree, gradient_agrees, laid_out, normal, refuses, untouched
from support.matrix import Here

torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
F = torch.nn.functional


def agrees_with(
    here: Here,
    op: str,
    host: np.ndarray,
    others: dict[str, Any],
    expected: Callable[[Any], Any],
    dtype: str = "float64",
    layout: str = "packed",
    tolerance: float = 1e-10,
    **options: Any,
) -> None:
    """The op's value and gradient are those of ``expected``, PyTorch's, for a dy that is not
    one."""
    leaf = torch.tensor(host, requires_grad=True)
    right = expected(leaf)
    dy = normal(*right.shape, seed=9)
    right.backward(torch.tensor(dy))
    x = laid_out(here, host, dtype, layout)
    given = {
        name: here.array(value, dtype if value.dtype.kind == "f" else None)
        for name, value in others.items()
        if value is not None
    }
    with untouched(here, x, *given.values()):
        y, cache = getattr(ops, op)(x, **given, **options)
        dx = getattr(ops, f"{op}_backward")(here.array(dy, dtype), cache)
    agree(here, here.xp.asarray(y), right.detach().numpy(), x, tolerance)
    agree(here, dx, leaf.grad.numpy(), x, tolerance)
    quiet, none = getattr(ops, op)(x, **given, **options, keep=False)
    assert none is None
    agree(here, here.xp.asarray(quiet), right.detach().numpy(), x, tolerance)


DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 2e-5)])
EACH = pytest.mark.parametrize(
    ("reduction", "dtype", "tolerance"),
    [
        ("mean", "float64", 1e-10),
        ("sum", "float64", 1e-10),
        ("none", "float64", 1e-10),
        ("mean", "float32", 2e-5),
    ],
)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


# --- values ---------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("delta", [0.3, 4.0])
def test_huber(backend: Here, delta: float, reduction: str, dtype: str, tolerance: float):
    x, t = 2 * normal(4, 3, 2), normal(4, 3, 2, seed=1)
    agrees_with(
        backend,
        "huber_loss",
        x,
        {"target": t},
        lambda leaf: F.huber_loss(leaf, torch.tensor(t), reduction=reduction, delta=delta),
        dtype,
        "batch_last",
        tolerance,
        reduction=reduction,
        delta=delta,
    )


@EACH
def test_l1(backend: Here, reduction: str, dtype: str, tolerance: float):
    x, t = normal(4, 3), normal(4, 3, seed=1)
    t[0, 0] = x[0, 0] = 0.5  # the gradient is 0 there
    agrees_with(
        backend,
        "l1_loss",
        x,
        {"target": t},
        lambda leaf: F.l1_loss(leaf, torch.tensor(t), reduction=reduction),
        dtype,
        "stepped",
        tolerance,
        reduction=reduction,
    )


@pytest.mark.parametrize("name", ["l1_loss", "huber_loss", "sigmoid_focal_loss"])
def test_factors_of_single_elements(backend: Here, name: str):
    x, t, weight = (
        normal(3, 4),
        np.round(np.random.default_rng(0).random((3, 4))),
        normal(3, 1) ** 2,
    )
    arrays = [backend.array(a) for a in (x, t, weight)]
    each, kept = getattr(ops, name)(*arrays[:2], reduction="none")
    loss, cache = getattr(ops, name)(*arrays[:2], weight=arrays[2])
    agree(backend, backend.xp.asarray(loss), np.mean(weight * backend.host(each)), arrays[0])
    back = getattr(ops, f"{name}_backward")
    dx = weight * backend.host(back(1.0, kept)) / x.size
    agree(backend, back(1.0, cache), dx, arrays[0])


# --- focal ----------------------------------------------------------------------------------------


def focal(
    logits: Any, t: np.ndarray, gamma: float, alpha: Any, ignored: int, reduction: str
) -> Any:
    """By definition, from log_softmax."""
    log_p = F.log_softmax(logits, 1)
    labels = torch.tensor(np.where(t == ignored, 0, t)).unsqueeze(1)
    log_t = log_p.gather(1, labels).squeeze(1)
    factor = torch.tensor((t != ignored).astype("float64"))
    if alpha is not None:
        factor = factor * torch.tensor(alpha)[labels.squeeze(1)]
    losses = -factor * (1 - log_t.exp()) ** gamma * log_t
    if reduction == "mean":
        return losses.sum() / (t != ignored).sum()
    return losses.sum() if reduction == "sum" else losses


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(2, 6)) | st.tuples(*[st.integers(1, 3)] * 4),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]),
    weighted=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    ignored=st.sampled_from([-100, 0]),
)
def test_focal(backend: Here, shape, gamma, weighted, reduction, ignored):
    x = 2 * normal(*shape)
    t = np.random.default_rng(1).integers(0, shape[1], (shape[0], *shape[2:]))
    t[0] = shape[1] - 1 if ignored == 0 else t[0]
    if shape[1] == 1:
        ignored = -100
        x[...] = 1.0
        if 0 < gamma < 1:
            return  # PyTorch's gradient is NaN where p is 1
    alpha = np.arange(1.0, shape[1] + 1) if weighted else None
    agrees_with(
        backend,
        "focal_loss",
        x,
        {"target": t, "weight": alpha},
        lambda leaf: focal(leaf, t, gamma, alpha, ignored, reduction),
        tolerance=1e-9,
        gamma=gamma,
        reduction=reduction,
        ignore_index=ignored,
    )


def test_focal_far_out(backend: Here):
    """A probability of exactly 1 or 0, where 1 - p or log(p) would be lost."""
    x = backend.array(np.array([[1e4, 0.0], [0.0, 1e4], [20.0, 0.0]]), "float32")
    t = backend.array(np.array([0, 0, 0]))
    for gamma in (0.0, 0.5, 2.0):
        each, cache = ops.focal_loss(x, t, gamma=gamma, reduction="none")
        p = np.exp(-20.0)
        agree(backend, each, [0.0, 1e4, p ** (1 + gamma)], x, 1e-5)
        assert backend.host(each)[2] == pytest.approx(p ** (1 + gamma), rel=1e-5)
        dx = backend.host(ops.focal_loss_backward(1.0, cache))
        np.testing.assert_allclose(dx[:2], [[0, 0], [-1, 1]], atol=1e-6)
        assert dx[2, 1] == pytest.approx((1 + gamma) * p ** (1 + gamma), rel=1e-4)


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@REDUCTIONS
def test_sigmoid_focal(backend: Here, gamma: float, alpha: float | None, reduction: str):
    """torchvision's formula."""
    x, t = 3 * normal(4, 3), np.round(np.random.default_rng(0).random((4, 3)))

    def theirs(leaf: Any) -> Any:
        target = torch.tensor(t)
        p = leaf.sigmoid()
        ce = F.binary_cross_entropy_with_logits(leaf, target, reduction="none")
        p_t = p * target + (1 - p) * (1 - target)
        loss = ce * (1 - p_t) ** gamma
        if alpha is not None:
            loss = (alpha * target + (1 - alpha) * (1 - target)) * loss
        return {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()

    options = {"gamma": gamma, "alpha": alpha, "reduction": reduction}
    agrees_with(backend, "sigmoid_focal_loss", x, {"target": t}, theirs, **options)


# --- dice -----------------------------------------------------------------------------------------


def dice(p: Any, t: Any, smooth: float, weight: np.ndarray | None) -> Any:
    """By definition, sample by sample and class by class."""
    losses = []
    for n in range(p.shape[0]):
        for c in range(p.shape[1]):
            both = (p[n, c] * t[n, c]).sum()
            share = (2 * both + smooth) / (p[n, c].sum() + t[n, c].sum() + smooth)
            losses.append((1 - share) * (1.0 if weight is None else weight[n]))
    return torch.stack(losses).mean()


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["packed", "batch_last"])
def test_dice_of_classes(backend: Here, layout: str, weighted: bool, dtype: str, tolerance: float):
    rng = np.random.default_rng(0)
    p, t = rng.random((3, 4, 2, 5)), rng.integers(0, 3, (3, 2, 5)).astype("uint8")
    t[0, 0, 1] = 255
    weight = np.array([0.5, 0.0, 2.0]) if weighted else None
    seen = torch.tensor((t != 255)[:, None].astype("float64"))
    masks = torch.tensor(np.moveaxis(np.eye(256)[t], -1, 1)[:, :4])
    agrees_with(
        backend,
        "dice_loss",
        p,
        {"target": t, "weight": weight},
        lambda leaf: dice(leaf * seen, masks, 0.7, weight),
        dtype,
        layout,
        tolerance,
        smooth=0.7,
        ignore_index=255,
    )


def test_dice_of_masks(backend: Here):
    rng = np.random.default_rng(0)
    p, t = rng.random((2, 3, 4)), rng.integers(0, 2, (2, 3, 4)).astype("uint8")
    t[0, 1] = 0  # a class that is not there
    agrees_with(
        backend,
        "dice_loss",
        p,
        {"target": t},
        lambda leaf: dice(leaf, torch.tensor(t.astype("float64")), 1.0, None),
    )


def test_dice_of_a_large_image_keeps_its_digits(backend: Here):
    """Batch-last, cells would be added one by one: 2^20 times 0.1 is then off by 1e-3."""
    p = backend.xp.full(
        (1, 1, 1024, 1024), 0.1, dtype=backend.xp.float32, device=backend.array(np.zeros(1)).device
    )
    t = backend.array(np.ones((1, 1, 1024, 1024), dtype="uint8"))
    loss, _ = ops.dice_loss(p, t, keep=False)
    assert float(backend.host(loss)) == pytest.approx(1 - 0.2 / 1.1, rel=1e-5)


# --- embeddings -----------------------------------------------------------------------------------


def contrast(e: Any, labels: np.ndarray, temperature: float, weight: np.ndarray | None) -> Any:
    """By definition, anchor by anchor."""
    z = F.normalize(e, dim=1)
    losses, total = [], 0.0
    for i in range(len(labels)):
        alike = [j for j in range(len(labels)) if j != i and labels[j] == labels[i]]
        if alike:
            others = [j for j in range(len(labels)) if j != i]
            logits = (z[others] @ z[i]) / temperature
            log_p = F.log_softmax(logits, 0)
            own = 1.0 if weight is None else weight[i]
            losses.append(-own * sum(log_p[others.index(j)] for j in alike) / len(alike))
            total += own
    return torch.stack(losses).sum() / total


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [3, 5, 3, 3, 7, 5]], ids=str)
def test_nt_xent(backend: Here, labels: list, weighted: bool, dtype: str, tolerance: float):
    labels = np.array(labels)
    weight = np.array([1.0, 2.0, 0.0, 0.5, 3.0, 1.0]) if weighted else None
    agrees_with(
        backend,
        "nt_xent_loss",
        normal(6, 4),
        {"labels": labels, "weight": weight},
        lambda leaf: contrast(leaf, labels, 0.2, weight),
        dtype,
        "reversed",
        tolerance,
        temperature=0.2,
    )


def test_nt_xent_at_its_limits(backend: Here):
    far = backend.array(np.array([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]]), "float32")
    loss, cache = ops.nt_xent_loss(far, backend.array(np.array([0, 0, 1])), temperature=0.005)
    assert backend.host(loss) == pytest.approx((np.log(2) + 400.0) / 2, rel=1e-5)
    assert np.isfinite(backend.host(ops.nt_xent_loss_backward(1.0, cache))).all()
    for host in (np.zeros((3, 2)), np.zeros((1, 2)), np.zeros((0, 2)), normal(3, 2)):
        x, alone = backend.array(host), backend.array(np.arange(len(host)))
        loss, cache = ops.nt_xent_loss(x, alone)
        assert backend.host(loss) == 0.0
        agree(backend, ops.nt_xent_loss_backward(1.0, cache), np.zeros(host.shape), x)


def triplets(
    e: Any, labels: np.ndarray, kind: str, margin: float, weight: np.ndarray | None
) -> Any:
    """The mean of PyTorch's losses of the triplets, picked anchor by anchor."""
    each = torch.nn.TripletMarginLoss(margin=margin, reduction="none")
    chosen = []
    numbers = range(len(labels))
    for i in numbers:
        alike = [j for j in numbers if j != i and labels[j] == labels[i]]
        others = [j for j in numbers if labels[j] != labels[i]]
        away = torch.linalg.vector_norm(e - e[i], dim=1).detach().numpy()
        if kind == "hardest" and alike and others:
            alike, others = [max(alike, key=away.item)], [min(others, key=away.item)]
        for p in alike:
            if kind == "semihard" and others:
                farther = [n for n in others if away[n] > away[p]]
                nearest = min(farther, key=away.item) if farther else max(others, key=away.item)
                chosen.append((i, p, nearest))
            else:
                chosen += [(i, p, n) for n in others]
    if not chosen:
        return (0.0 * e).sum()
    a, p, n = (list(places) for places in zip(*chosen, strict=True))
    factor = torch.tensor(np.ones(len(labels)) if weight is None else weight)[a]
    return (factor * each(e[a], e[p], e[n])).sum() / factor.sum()


@DTYPES
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["semihard", "hardest", "all"])
@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [3, 5, 3, 3, 7, 5], [1] * 6], ids=str)
def test_triplet(
    backend: Here, labels: list, kind: str, weighted: bool, dtype: str, tolerance: float
):
    labels = np.array(labels)
    weight = np.array([1.0, 2.0, 0.0, 0.5, 3.0, 1.0]) if weighted else None
    agrees_with(
        backend,
        "triplet_loss",
        normal(6, 4),
        {"labels": labels, "weight": weight},
        lambda leaf: triplets(leaf, labels, kind, 0.5, weight),
        dtype,
        "reversed",
        tolerance,
        margin=0.5,
        triplets=kind,
    )


@pytest.mark.parametrize("kind", ["semihard", "all"])
def test_triplets_of_a_large_batch_come_in_parts(backend: Here, kind: str, monkeypatch: Any):
    x, labels = backend.array(normal(11, 3)), backend.array(np.arange(11) % 3)
    weight = backend.array(normal(11, seed=2) ** 2)
    whole, cache = ops.triplet_loss(x, labels, triplets=kind, weight=weight)
    gradient = backend.host(ops.triplet_loss_backward(1.0, cache))
    monkeypatch.setattr("portacnn.ops.triplet.CUBE", 500)  # four anchors at a time
    loss, cache = ops.triplet_loss(x, labels, triplets=kind, weight=weight)
    agree(backend, backend.xp.asarray(loss), backend.host(whole), x)
    agree(backend, ops.triplet_loss_backward(1.0, cache), gradient, x)


@pytest.mark.parametrize("kind", ["semihard", "hardest", "all"])
def test_triplet_at_its_limits(backend: Here, kind: str):
    """Equal points have no direction; a batch without triplets has no loss; NaN stays NaN."""
    for host, labels in ((np.zeros((4, 2)), [0, 0, 1, 1]), (np.zeros((0, 2)), []),
                         (np.zeros((1, 2)), [0]), (normal(3, 2), [0, 1, 2])):  # fmt: skip
        x, t = backend.array(host, "float32"), backend.array(np.array(labels, "int64"))
        loss, cache = ops.triplet_loss(x, t, triplets=kind)
        assert backend.host(loss) == (1.0 if len(labels) == 4 else 0.0)
        dx = backend.host(ops.triplet_loss_backward(1.0, cache))
        assert np.isfinite(dx).all()
        assert dx.shape == host.shape
    x = backend.array(np.array([[0.0], [np.nan], [3.0], [4.0]]))
    loss, _ = ops.triplet_loss(x, backend.array(np.array([0, 0, 1, 1])), triplets=kind)
    assert np.isnan(backend.host(loss))


# --- of all ---------------------------------------------------------------------------------------


CASES: dict[str, tuple[tuple[int, ...], dict[str, np.ndarray], dict[str, Any]]] = {
    "l1_loss": ((3, 2), {"target": normal(3, 2, seed=1), "weight": normal(2) ** 2}, {}),
    "huber_loss": ((3, 2), {"target": normal(3, 2, seed=1)}, {"delta": 0.6}),
    "focal_loss": ((3, 4), {"target": np.array([0, 3, 1]), "weight": normal(4) ** 2}, {}),
    "sigmoid_focal_loss": ((3, 2), {"target": np.array([[0, 1], [0.3, 1], [0, 0.0]])}, {}),
    "dice_loss": ((2, 2, 3), {"target": np.array([[0, 1, 1], [1, 0, 5]])}, {"ignore_index": 5}),
    "nt_xent_loss": ((5, 3), {"labels": np.array([0, 1, 0, 1, 2])}, {"temperature": 0.5}),
    "triplet_loss": ((5, 3), {"labels": np.array([0, 1, 0, 1, 2])}, {"margin": 3.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_numerical_gradient(backend: Here, name: str):
    shape, others, options = CASES[name]
    host = np.abs(normal(*shape)) + 0.1 if name == "dice_loss" else normal(*shape)
    given = {word: backend.array(value) for word, value in others.items()}
    op = getattr(ops, name)
    _, cache = op(backend.array(host), **given, **options)
    gradient = getattr(ops, f"{name}_backward")(1.0, cache)
    gradient_agrees(backend, gradient, lambda x: op(x, **given, **options, keep=False)[0], host)


@pytest.mark.parametrize(
    ("kind", "words", "call"),
    [
        (ArgumentError, ("huber_loss", "delta"), lambda x, t: ops.huber_loss(x, x, delta=0.0)),
        (ShapeError, ("l1_loss", "3x4"), lambda x, t: ops.l1_loss(x, x[:, 0])),
        (ArgumentError, ("focal_loss", "gamma"), lambda x, t: ops.focal_loss(x, t, gamma=-1)),
        (LabelError, ("focal_loss", "expected labels"), lambda x, t: ops.focal_loss(x, x)),
        (
            ShapeError,
            ("focal_loss", "one per class"),
            lambda x, t: ops.focal_loss(x, t, weight=x[0, :3]),
        ),
        (
            ArgumentError,
            ("sigmoid_focal_loss", "alpha"),
            lambda x, t: ops.sigmoid_focal_loss(x, x, alpha=2.0),
        ),
        (ShapeError, ("dice_loss", "(N, C, *S)"), lambda x, t: ops.dice_loss(x, t)),
        (LabelError, ("dice_loss", "(3,)"), lambda x, t: ops.dice_loss(x[:, :, None], t)),
        (
            ArgumentError,
            ("nt_xent_loss", "temperature"),
            lambda x, t: ops.nt_xent_loss(x, t, temperature=0),
        ),
        (ArgumentError, ("triplet_loss", "margin"), lambda x, t: ops.triplet_loss(x, t, margin=-1)),
        (
            ArgumentError,
            ("triplet_loss", "semihard", "'easy'"),
            lambda x, t: ops.triplet_loss(x, t, triplets="easy"),
        ),
        (LabelError, ("triplet_loss", "3 integer"), lambda x, t: ops.triplet_loss(x, t[:2])),
        (LabelError, ("nt_xent_loss", "3 integer"), lambda x, t: ops.nt_xent_loss(x, t[:2])),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_errors(backend: Here, kind: Any, words: tuple[str, ...], call: Any):
    x, t = backend.array(normal(3, 4)), backend.array(np.array([0, 1, 3]))
    refuses(kind, *words, call=lambda: call(x, t))
