"""Average precision of boxes: COCO's own program where it is installed, and cases by hand."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from portacnn.errors import ArgumentError, ShapeError
from portacnn.metrics import AveragePrecision
from support.checks import refuses
from support.matrix import Here, needs


def drawn(rng: np.random.Generator, count: int, classes: int = 3) -> dict[str, np.ndarray]:
    """Boxes of whole numbers, which both programs make the same areas of."""
    corner = rng.integers(0, 20, (count, 2))
    size = rng.integers(1, 15, (count, 2))
    boxes = np.concatenate([corner, corner + size], axis=1).astype("float64")
    return {"boxes": boxes, "labels": rng.integers(0, classes, count)}


def images(rng: np.random.Generator, count: int) -> tuple[list[Any], list[Any]]:
    """Detections near the true boxes, far from them, twice, of other classes."""
    found, true = [], []
    for _ in range(count):
        real = drawn(rng, int(rng.integers(0, 7)))
        near = {
            "boxes": real["boxes"] + rng.integers(-1, 2, real["boxes"].shape) * [0, 0, 1, 1],
            "labels": np.where(rng.random(len(real["labels"])) < 0.8, real["labels"], 0),
        }
        near["boxes"][:, 2:] = np.maximum(near["boxes"][:, 2:], near["boxes"][:, :2] + 1)
        other = drawn(rng, int(rng.integers(0, 5)))
        both = {name: np.concatenate([near[name], near[name][:2], other[name]]) for name in near}
        both["scores"] = rng.integers(0, 50, len(both["labels"])) / 64
        found.append(both)
        true.append(real)
    return found, true


def of_coco(found: list[Any], true: list[Any]) -> tuple[float, float]:
    """(mean over IoU 0.5:0.95, at 0.5) of pycocotools."""
    from pycocotools import coco, cocoeval

    def listed(data: list[Any]) -> list[dict[str, Any]]:
        made = []
        for number, image in enumerate(data):
            for k, (box, label) in enumerate(zip(image["boxes"], image["labels"], strict=True)):
                x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
                one = {"image_id": number + 1, "category_id": int(label), "bbox": [x, y, w, h],
                       "area": w * h, "iscrowd": 0, "id": len(made) + 1}  # fmt: skip
                if "scores" in image:
                    one["score"] = float(image["scores"][k])
                made.append(one)
        return made

    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": number + 1} for number in range(len(true))],
            "categories": [{"id": label} for label in range(3)],
            "annotations": listed(true),
        }
        truth.createIndex()
        judge = cocoeval.COCOeval(truth, truth.loadRes(listed(found)), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0]), float(judge.stats[1])


@needs("pycocotools")
@pytest.mark.parametrize("seed", range(4))
def test_cocos_own_program(backend: Here, seed: int):
    found, true = images(np.random.default_rng(seed), 12)
    every, half = of_coco(found, true)
    for iou, expected in (("coco", every), (0.5, half)):
        metric = AveragePrecision(iou)
        for first, last in ((0, 5), (5, 6), (6, 12)):
            metric.update(sent(backend, found[first:last]), sent(backend, true[first:last]))
        assert metric.compute() == pytest.approx(expected, abs=1e-12)
        assert 0.05 < expected < 0.95


def sent(here: Here, data: list[Any]) -> list[Any]:
    return [{name: here.array(value) for name, value in image.items()} for image in data]


def test_values_agree_with_a_calculation_by_hand(backend: Here):
    """Two boxes; the first detection finds one, the second is beside, the third finds the other:
    precision 1 up to recall 0.5, then 2/3."""
    square = [0.0, 0.0, 2.0, 2.0]
    true = [{"boxes": np.array([square, [10.0, 10, 12, 12]]), "labels": np.array([1, 1])}]
    found = [
        {
            "boxes": np.array([square, [5.0, 5, 6, 6], [10.0, 10, 12, 13]]),
            "scores": np.array([0.9, 0.8, 0.7]),
            "labels": np.array([1, 1, 1]),
        }
    ]
    metric = AveragePrecision(0.5)
    metric.update(sent(backend, found), sent(backend, true))
    assert metric.compute() == pytest.approx((51 + 50 * 2 / 3) / 101)
    strict = AveragePrecision([0.7])  # the third overlaps by 4/6
    strict.update(sent(backend, found), sent(backend, true))
    assert strict.compute() == pytest.approx(51 / 101)
    metric.reset()
    assert np.isnan(metric.compute())


def test_wrong_arguments_are_refused(backend: Here):
    metric, box = AveragePrecision(), backend.array(np.zeros((1, 4)))
    labels = backend.array(np.zeros(1))
    true = {"boxes": box, "labels": labels}
    refuses(ShapeError, "as many images", call=lambda: metric.update([], [true]))
    refuses(ArgumentError, "scores", call=lambda: metric.update([true], [true]))
    wrong = {"boxes": box[:, :3], "labels": labels, "scores": labels}
    refuses(ShapeError, "(D, 4)", call=lambda: metric.update([wrong], [true]))
    short = {"boxes": box, "labels": labels[:0], "scores": labels}
    refuses(ShapeError, "1 boxes", call=lambda: metric.update([short], [true]))
    refuses(ArgumentError, "iou", call=lambda: AveragePrecision(1.5))
