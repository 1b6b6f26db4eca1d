"""Box arithmetic, NMS and the head of centres, each against loops in float64."""

from typing import Any

import numpy as np
import pytest

from portacnn import detection
from portacnn.errors import ArgumentError, ArrayError, LabelError, ShapeError
from support.checks import DTYPES, agree, refuses
from support.matrix import Here


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Boxes with corners in quarters of a pixel, some of them empty."""
    corner = rng.integers(0, 40, (*shape, 2)) / 4
    return np.concatenate([corner, corner + rng.integers(0, 30, (*shape, 2)) / 4], axis=-1)


def iou(a: Any, b: Any) -> tuple[float, float]:
    """IoU and GIoU of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = width * height if width > 0 and height > 0 else 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    plain = common / union if union else 0.0
    return plain, plain - (hull - union) / hull if hull else plain


def suppressed(boxes: Any, scores: Any, labels: Any, threshold: float) -> list[bool]:
    """Which boxes are kept, best first: by the definition."""
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if all(labels[i] != labels[j] or iou(boxes[i], boxes[j])[0] <= threshold for j in kept):
            kept.append(i)
    return [i in kept for i in range(len(scores))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arithmetic(backend: Here, dtype: str):
    rng = np.random.default_rng(0)
    a, b = drawn(rng, 2, 7), drawn(rng, 2, 5)
    a[0, 0] = b[0, 0] = [3.0, 3.0, 3.0, 3.0]
    x, y = backend.array(a, dtype), backend.array(b, dtype)
    pairs = [[[iou(p, q) for q in b[n]] for p in a[n]] for n in range(2)]
    agree(backend, detection.box_iou(x, y), np.array(pairs)[..., 0], x)
    agree(backend, detection.generalized_box_iou(x, y), np.array(pairs)[..., 1], x)
    agree(backend, detection.box_iou(x[0, ...], y[0, ...]), np.array(pairs)[0, ..., 0], x)
    areas = [[(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in image] for image in a]
    agree(backend, detection.box_area(x), areas, x)
    cut = [[[min(max(v, 0), most) for v, most in zip(box, (6, 4, 6, 4), strict=True)]
            for box in image] for image in a - 2]  # fmt: skip
    agree(backend, detection.clip_boxes_to_image(x - 2, (4, 6)), cut, x)
    forms = {
        "xyxy": a,
        "xywh": [[(x1, y1, x2 - x1, y2 - y1) for x1, y1, x2, y2 in i] for i in a],
        "cxcywh": [
            [((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1) for x1, y1, x2, y2 in i] for i in a
        ],
    }
    for before, given in forms.items():
        for after, expected in forms.items():
            got = detection.box_convert(backend.array(np.array(given), dtype), before, after)
            agree(backend, got, expected, x)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5])
def test_nms(backend: Here, threshold: float):
    """Three images of 30 boxes: many overlap, some have the same score; some thresholds are met
    exactly."""
    rng = np.random.default_rng(1)
    boxes, labels = drawn(rng, 3, 30), rng.integers(0, 3, (3, 30))
    boxes[0, :3] = [[0, 0, 2, 1], [0, 0, 1, 1], [0, 0, 2, 1]]  # IoU 0.5 and 1
    scores = rng.integers(0, 20, (3, 30)) / 32
    sent = backend.array(boxes, "float32"), backend.array(scores, "float32")
    classes = backend.array(labels)
    every = [suppressed(*of, [0] * 30, threshold) for of in zip(boxes, scores, strict=True)]
    each = [suppressed(*of, threshold) for of in zip(boxes, scores, labels, strict=True)]
    assert backend.host(detection.nms(*sent, threshold)).tolist() == every
    got = detection.batched_nms(*sent, classes, threshold)
    assert got.device == sent[0].device
    assert backend.host(got).tolist() == each != every
    alone = detection.batched_nms(*(array[1, ...] for array in (*sent, classes)), threshold)
    assert backend.host(alone).tolist() == each[1]
    assert detection.nms(sent[0][:, :0, :], sent[1][:, :0], threshold).shape == (3, 0)
    found = detection.per_image({"scores": sent[1], "labels": classes, "boxes": sent[0]}, got)
    for image, box, score, label, kept in zip(found, boxes, scores, labels, each, strict=True):
        order = sorted(np.flatnonzero(kept), key=lambda i: (-score[i], i))
        assert image["boxes"].tolist() == box[order].tolist()
        assert image["scores"].tolist() == score[order].tolist()
        assert image["labels"].tolist() == label[order].tolist()


def test_targets_by_loops():
    rng = np.random.default_rng(2)
    images = []
    for count in (0, 1, 4):
        corner = rng.uniform(0, 20, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(2, 12, (count, 2))], axis=1)
        images.append({"boxes": boxes, "labels": rng.integers(0, 9, count)})
    got = detection.center_targets(images, (6, 8), 4, radius=1.2, dtype="float64")
    assert got.shape == (3, 5, 6, 8)
    for map_, image in zip(got, images, strict=True):
        for i in range(6):
            for j in range(8):
                x, y, near = 4 * j + 2, 4 * i + 2, []
                for (x1, y1, x2, y2), label in zip(image["boxes"], image["labels"], strict=True):
                    right, down = (x1 + x2) / 2 - x, (y1 + y2) / 2 - y
                    if max(abs(right), abs(down)) < 1.2 * 4:
                        edges = ((x - x1) / 4, (y - y1) / 4, (x2 - x) / 4, (y2 - y) / 4)
                        near.append((right**2 + down**2, label + 1, *edges))
                expected = min(near)[1:] if near else (0.0,) * 5
                np.testing.assert_allclose(map_[:, i, j], expected, atol=1e-12)
    assert 9 <= np.count_nonzero(got[:, 0]) < 60


def test_decoding(backend: Here):
    """Loops over the cells; and boxes that were encoded come back."""
    rng = np.random.default_rng(3)
    y = rng.standard_normal((2, 1 + 3 + 4, 3, 5)) * 2
    expected = []
    for n in range(2):
        cells = []
        for i in range(3):
            for j in range(5):
                chances = np.exp(y[n, :4, i, j]) / np.exp(y[n, :4, i, j]).sum()
                label = int(chances[1:].argmax())
                left, up, right, down = y[n, 4:, i, j] * 8
                cx, cy = 8 * j + 4, 8 * i + 4
                box = [cx - left, cy - up, max(cx + right, cx - left), max(cy + down, cy - up)]
                box = [min(max(v, 0), m) for v, m in zip(box, (40, 24, 40, 24), strict=True)]
                cells.append((chances[1 + label], label, box))
        expected.append(sorted(cells, key=lambda cell: -cell[0])[:6])
    sent = backend.array(y)
    got = detection.center_decode(sent, 8, top=6)
    agree(backend, got["scores"], [[cell[0] for cell in image] for image in expected], sent)
    agree(backend, got["boxes"], [[cell[2] for cell in image] for image in expected], sent)
    assert backend.host(got["labels"]).tolist() == [[c[1] for c in image] for image in expected]

    true = {"boxes": np.array([[1.0, 2, 9, 12], [20, 3, 31, 18]]), "labels": np.array([2, 0])}
    t = detection.center_targets([true], (5, 9), 4, radius=0.51)[0]
    logits = 20.0 * (t[0].astype(int) == np.arange(4)[:, None, None])
    y = backend.array(np.concatenate([logits, t[1:]])[None].astype("float32"))
    found = detection.center_decode(y, 4)
    keep = detection.batched_nms(found["boxes"], found["scores"], found["labels"], 0.5)
    (image,) = detection.per_image(found, keep & (found["scores"] > 0.5))
    order = np.argsort(-image["labels"])
    np.testing.assert_allclose(image["boxes"][order], true["boxes"], atol=1e-4)
    assert image["labels"][order].tolist() == [2, 0]


def test_wrong_arguments_are_refused(backend: Here):
    boxes = backend.array(np.zeros((3, 4)), "float32")
    scores, whole = backend.array(np.zeros(3), "float32"), backend.array(np.zeros((3, 4), "int64"))
    refuses(ShapeError, "(..., 4)", call=lambda: detection.box_area(boxes[:, :3]))
    refuses(ShapeError, "(..., N, 4)", call=lambda: detection.box_iou(boxes, boxes[0, ...]))
    refuses(ArrayError, "floating", call=lambda: detection.box_area(whole))
    refuses(ArgumentError, "in_fmt", call=lambda: detection.box_convert(boxes, "yxyx", "xyxy"))
    refuses(ShapeError, "scores", call=lambda: detection.nms(boxes, scores[:2], 0.5))
    refuses(ArgumentError, "iou_threshold", call=lambda: detection.nms(boxes, scores, 1.5))
    refuses(ShapeError, "maps", call=lambda: detection.center_decode(boxes, 4))


def test_targets_that_do_not_fit():
    one = {"boxes": np.zeros((1, 4)), "labels": np.zeros(1, int)}
    for error, told, change in (
        (ShapeError, "(G, 4)", {"boxes": np.zeros(4)}),
        (LabelError, "labels", {"labels": np.zeros(2, int)}),
        (LabelError, "0 or more", {"labels": -np.ones(1, int)}),
        (ArgumentError, "finite", {"boxes": np.full((1, 4), np.nan)}),
    ):
        images = [one, {**one, **change}]
        refuses(
            error, "image 1", told, call=lambda i=images: detection.center_targets(i, (2, 2), 4)
        )
