"""Targets as people hand them over: what each loss takes, what it makes of it, and what it says of
the rest."""

from typing import Any

import numpy as np
import pytest

from portacnn.data.targets import class_weights, sample_weights
from portacnn.errors import ArgumentError, LabelError, NotFiniteError, ShapeError
from portacnn.losses import (
    MSE,
    BCEWithLogits,
    CenterDetection,
    CrossEntropy,
    Dice,
    Focal,
    NTXent,
    Triplet,
)
from support.checks import refuses
from support.matrix import Here

MASK = np.array([[[0, 2], [1, 1]]], "uint8")
HOT_MASK = np.moveaxis(np.eye(3)[MASK], -1, 1)


@pytest.mark.parametrize(
    ("loss", "t", "shape", "expected"),
    [
        (CrossEntropy(), [1, 0, 2], (3,), np.array([1, 0, 2])),
        (CrossEntropy(), np.array([1, 0], "uint8"), (3,), np.array([1, 0])),
        (CrossEntropy(), np.eye(3)[[1, 0, 2]], (3,), np.array([1, 0, 2])),
        (CrossEntropy(), [[0.25, 0.75], [1, 0]], (2,), np.array([[0.25, 0.75], [1, 0]], "float32")),
        (CrossEntropy(ignore_index=-100), [1, -100], (3,), np.array([1, -100])),
        (CrossEntropy(), MASK, (3, 2, 2), MASK),
        (CrossEntropy(), MASK.astype("int32"), (3, 2, 2), MASK.astype("int64")),
        (CrossEntropy(), HOT_MASK, (3, 2, 2), MASK),
        (CrossEntropy(ignore_index=255), MASK + 253, (3, 2, 2), None),
        (Dice(), HOT_MASK, (3, 2, 2), MASK),
        (Dice(multilabel=True), MASK > 0, (1, 2, 2), (MASK > 0).astype("uint8")[:, None]),
        (Focal(), [1, 0], (2,), np.array([1, 0])),
        (BCEWithLogits(), [[1, 0], [1, 1]], (2,), np.array([[1, 0], [1, 1]], "uint8")),
        (BCEWithLogits(), [True, False], (1,), np.array([[1], [0]], "uint8")),
        (BCEWithLogits(), [[0.5, 1.0]], (2,), np.array([[0.5, 1.0]], "float32")),
        (MSE(), [1, 2], (1,), np.array([[1], [2]], "float32")),
        (MSE(), [[1.5, 2.0]], (2,), np.array([[1.5, 2.0]], "float32")),
        (NTXent(), np.array([7, 7], "uint8"), (4,), np.array([7, 7])),
        (CenterDetection(), np.ones((2, 5, 1, 1)), (6, 1, 1), np.ones((2, 5, 1, 1), "float32")),
    ],
    ids=str,
)
def test_taken(loss: Any, t: Any, shape: tuple[int, ...], expected: Any):
    if expected is None:
        refuses(LabelError, "253", "ignore_index=255", call=lambda: loss.check_targets(t, shape))
        return
    got = loss.check_targets(t, shape, count=len(t))
    np.testing.assert_array_equal(got, expected, strict=True)


def test_arrays_of_any_library(backend: Here):
    t = backend.array(np.array([0, 1]))
    np.testing.assert_array_equal(CrossEntropy().check_targets(t, (2,)), [0, 1])
    made = MSE().check_targets(backend.array(np.array([[0.1], [0.2]])), (1,), dtype="float64")
    assert made.dtype == np.float64


@pytest.mark.parametrize(
    ("kind", "words", "loss", "t", "shape"),
    [
        (LabelError, ("0..2", "float64", '"mse"'), CrossEntropy(), [0.5, 1.5], (3,)),
        (LabelError, ("label 3 at index 1", "0..2"), CrossEntropy(), [0, 3], (3,)),
        (LabelError, ("label 3", "(0, 0, 1)", "CrossEntropy(ignore_index=3)"), CrossEntropy(),
         [[[0, 3]]], (3, 1, 2)),
        (LabelError, ("row 1 is not one-hot", "sum to 1", '"bce_with_logits"'), CrossEntropy(),
         [[1, 0], [1, 1]], (2,)),
        (LabelError, ("row 0 is not one-hot", '"mse"'), CrossEntropy(), [[0.7, 2.0]], (2,)),
        (LabelError, ("(1, 2, 2)", "(1, 3, 2, 2)", "(1,)"), CrossEntropy(), [1], (3, 2, 2)),
        (LabelError, ("one output", '"bce_with_logits"'), CrossEntropy(), [0, 1], (1,)),
        (LabelError, ("3 samples", "(2,)"), CrossEntropy(), [0, 1], (2,)),
        (LabelError, ("lists of unlike lengths",), CrossEntropy(), [[0, 1], [1]], (2,)),
        (LabelError, ("numbers", "got text", "numpy.unique(targets, return_inverse=True)"),
         CrossEntropy(), ["cat", "dog"], (2,)),
        (LabelError, ("0..1", "bool", "astype('int64')"), CrossEntropy(), [True, False], (2,)),
        (LabelError, ("label 3 at index 2", "from 0: use targets - 1"), CrossEntropy(),
         [1, 2, 3], (3,)),
        (LabelError, ("label -1 at index 1", "ignore_index=-1"), CrossEntropy(), [1, -1], (3,)),
        (LabelError, ("label 255", "for 0 and 255 use targets > 0"), CrossEntropy(),
         [[[0, 255]]], (2, 1, 2)),
        (LabelError, ("(2,)", "use targets.reshape((2,))"), CrossEntropy(), [[0], [1]], (2,)),
        (LabelError, ("(1, 1, 1, 2)", "use targets.reshape((1, 1, 2))"), CrossEntropy(),
         [[[[0, 1]]]], (3, 1, 2)),
        (LabelError, ("got 255 at (0, 0)", "for 0 and 255 use targets > 0"), BCEWithLogits(),
         [[255, 0]], (2,)),
        (LabelError, ("(2, 1)", "use targets.reshape((2, 1))"), MSE(), [[[0.5]], [[1.0]]], (1,)),
        (ShapeError, ("3 outputs", "got 2"), CrossEntropy(weight=[1, 2]), [0, 1], (3,)),
        (LabelError, ("not one-hot", "Focal"), Focal(), [[0.5, 0.5]], (2,)),
        (LabelError, ("(2, 3)", "(2,)", '"cross_entropy"'), BCEWithLogits(), [0, 2], (3,)),
        (LabelError, ("from 0 to 1", "got 2.0 at (0, 1)", '"mse"'), BCEWithLogits(),
         [[0, 2.0]], (2,)),
        (LabelError, ("0 or 1", "0.5"), Dice(multilabel=True), [[[0.5]]], (1, 1, 1)),
        (LabelError, ("(2, 3)", '"cross_entropy"'), MSE(), [0, 2], (3,)),
        (NotFiniteError, ("nan at (1, 0)",), MSE(), [0.0, np.nan], (1,)),
        (NotFiniteError, ("1e+300", "float32"), MSE(), [0.0, 1e300], (1,)),
        (ShapeError, ("Dice(multilabel=True)",), Dice(), MASK, (1, 2, 2)),
        (ShapeError, ("spatial axes", "(3,)", '"cross_entropy"'), Dice(), [0], (3,)),
        (LabelError, ("(1, 2, 2)", "models.UNet"), CrossEntropy(), MASK, (3,)),
        (LabelError, ("integers", "float64", '"mse"'), NTXent(), [0.5], (3,)),
        (LabelError, ("NTXent", "all 3 targets differ"), NTXent(), [0, 1, 2], (3,)),
        (LabelError, ("Triplet", "all targets are 4"), Triplet(), [4, 4], (3,)),
        (LabelError, ("Triplet", "integers", "(1, 1)"), Triplet(), [[1]], (3,)),
        (ShapeError, ("Triplet", "embeddings (D,)", "Flatten"), Triplet(), [1], (3, 2, 2)),
        (ShapeError, ("CenterDetection", "(1 + classes + 4, H, W)"), CenterDetection(), [1], (5,)),
        (LabelError, ("(1, 5, 2, 2)", "center_targets(boxes, (2, 2)"), CenterDetection(), MASK,
         (7, 2, 2)),
        (LabelError, ("0 for background or 1..1", "6 outputs", "got 2"), CenterDetection(),
         MASK[:, None].repeat(5, 1), (6, 2, 2)),
        (NotFiniteError, ("nan at (0, 0, 0, 0)",), CenterDetection(), np.full((1, 5, 2, 2), np.nan),
         (7, 2, 2)),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) and value else "",
)  # fmt: skip
def test_refused(kind: Any, words: tuple[str, ...], loss: Any, t: Any, shape: tuple[int, ...]):
    count = 3 if "3 samples" in words else None
    refuses(
        kind, "t_train: ", *words, call=lambda: loss.check_targets(t, shape, count=count,
        what="t_train")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("loss", "t", "count"),
    [
        (CrossEntropy(), [0, 4, 2], 5),
        (CrossEntropy(), np.eye(4), 4),
        (CrossEntropy(ignore_index=255), MASK + np.array([[[0, 253], [0, 0]]], "uint8"), 2),
        (CrossEntropy(), [], None),
        (BCEWithLogits(), [[1, 0, 1]], 3),
        (BCEWithLogits(), [1, 0], 1),
        (MSE(), [[0.5, 1.5]], 2),
        (MSE(), [0.5], 1),
        (NTXent(), [1, 1], None),
        (CenterDetection(), np.ones((2, 5, 1, 1)), None),
    ],
    ids=str,
)
def test_outputs_that_targets_ask_for(loss: Any, t: Any, count: int | None):
    t = np.array(t, "int64") if isinstance(t, list) and not t else t
    assert loss.num_outputs(t) == count


def test_class_weights():
    """ "balanced" as scikit-learn's."""
    utils = pytest.importorskip("sklearn.utils.class_weight")
    t = np.array([0, 0, 0, 2, 2, 1])
    expected = utils.compute_class_weight("balanced", classes=np.arange(3), y=t)
    assert class_weights("balanced", t, 3) == pytest.approx(expected)
    assert class_weights("balanced", np.array([0, 255]), 2, ignore_index=255) == (0.5, 1.0)
    assert class_weights({2: 5}, t, 3) == (1.0, 1.0, 5.0)
    assert class_weights(np.array([1.0, 2.0]), t, 2) == (1.0, 2.0)
    for words, what in (
        (("'even'", "balanced"), "even"),
        (("class 3", "0..2"), {3: 1.0}),
        (("3 classes", "got 2"), [1, 2]),
        (("0 or more",), [1, -1, 1]),
        (("0 or more",), [0, 0, 0]),
    ):
        refuses(ArgumentError, *words, call=lambda what=what: class_weights(what, t, 3))
    refuses(ArgumentError, "float64", call=lambda: class_weights("balanced", [0.5], 2))


def test_sample_weights(backend: Here):
    got = sample_weights(backend.array(np.array([1.0, 0.0])), 2, dtype="float32")
    np.testing.assert_array_equal(got, np.array([1, 0], "float32"), strict=True)
    for words, weight in (
        (("2 samples", "(3,)"), [1, 2, 3]),
        (("0 or more",), [1, -1]),
        (("finite",), [1, np.nan]),
        (("zero for every",), [0, 0]),
    ):
        refuses(
            ArgumentError, "sample_weight", *words, call=lambda weight=weight: sample_weights(
            weight, 2, dtype="float32")
        )  # fmt: skip
