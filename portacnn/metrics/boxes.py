"""Metrics of object detection: ``AveragePrecision``, by COCO's rules.

Notation: D detections and G true boxes of one image; a box is (x1, y1, x2, y2).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import nan
from typing import Any, ClassVar

import numpy as np

from portacnn.arguments import fraction, listed, whole
from portacnn.errors import ArgumentError, ShapeError
from portacnn.metrics.base import Metric
from portacnn.runtime import Array, HostArray, backend_of

_RECALLS = np.linspace(0.0, 1.0, 101)
_COCO = tuple(0.5 + 0.05 * step for step in range(10))


@dataclass
class AveragePrecision(Metric):
    """The area under the curve of precision over recall, the mean over classes and IoU thresholds,
    by COCO's rules.

    A detection is right if its IoU with a true box of its class is at least the threshold, and no
    detection with a higher score has matched that box. Precision is interpolated at 101 recalls:
    the maximum at that recall or a higher one.

    Args:
        iou: one or several thresholds, or "coco" for 0.5, 0.55, ..., 0.95.
        max_detections: the number of detections per class and image, best scores first.

    Crowd regions and COCO's object sizes are not supported.
    """

    iou: Any = 0.5
    max_detections: int = 100
    _found: Any = field(default=None, init=False, repr=False, compare=False)
    _true: Any = field(default=None, init=False, repr=False, compare=False)

    words: ClassVar[tuple[str, ...]] = ("boxes", "scores", "labels")

    def __post_init__(self) -> None:
        iou = _COCO if self.iou == "coco" else listed(self.iou)
        several = iou if isinstance(iou, Sequence) and not isinstance(iou, str) else [iou]
        self.iou = tuple(fraction("iou", value) for value in several)
        if not self.iou:
            raise ArgumentError("expected at least one iou threshold, such as 0.5, got none")
        self.max_detections = whole("max_detections", self.max_detections, 1)
        self.reset()

    def reset(self) -> None:
        self._found, self._true = [], []

    def pieces(self) -> tuple[Array, ...]:
        """Return the images' tables, detections first, each with the number of its rows."""
        made: list[Array] = []
        for tables in (self._found, self._true) if self._found else ():
            xp, like = backend_of(tables[0]).xp, tables[0]
            lengths = [table.shape[0] for table in tables]
            made += [
                xp.concat(tables, axis=0),
                xp.asarray(lengths, dtype=xp.int64, device=like.device),
            ]
        return tuple(made)

    def put(self, pieces: tuple[Array, ...]) -> None:
        self._found, self._true = _apart(*pieces[:2]), _apart(*pieces[2:])

    def update(self, y: Any, t: Any) -> None:
        """Add the images of a batch.

        Args:
            y: for each image a mapping with "boxes" (D, 4), "scores" (D,) and "labels" (D,).
            t: for each image a mapping with "boxes" (G, 4) and "labels" (G,).
        """
        if len(y) != len(t):
            raise ShapeError(
                f"expected the boxes of as many images as targets, got {len(y)} and {len(t)}",
                "AveragePrecision",
            )
        self._found += [_table(image, "boxes", "scores", "labels") for image in y]
        self._true += [_table(image, "boxes", "labels") for image in t]

    def compute(self) -> float:
        """Return the mean over thresholds and over classes with true boxes; NaN if there are no
        true boxes."""
        found, true = _read(self._found), _read(self._true)
        classes = sorted({int(label) for image in true for label in image[:, -1]})
        values = []
        for label in classes:
            images = []
            for detections, boxes in zip(found, true, strict=True):
                own = detections[detections[:, -1] == label]
                order = np.argsort(-own[:, 4], kind="stable")[: self.max_detections]
                images.append((own[order][:, :5], boxes[boxes[:, -1] == label][:, :4]))
            values += [_average_precision(images, threshold) for threshold in self.iou]
        return sum(values) / len(values) if values else nan


def _table(image: Mapping[str, Array], *words: str) -> Array:
    """Return boxes, scores and labels of an image in one array, (D, 6) or (D, 5), on the device."""
    if not isinstance(image, Mapping) or any(word not in image for word in words):
        raise ArgumentError(
            f"AveragePrecision: each image is a mapping with {', '.join(words)}; got "
            f"{list(image) if isinstance(image, Mapping) else type(image).__name__}"
        )
    boxes, *others = (image[word] for word in words)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ShapeError(
            f"expected boxes (D, 4), got shape {tuple(boxes.shape)}", "AveragePrecision"
        )
    if wrong := [tuple(o.shape) for o in others if tuple(o.shape) != tuple(boxes.shape[:1])]:
        raise ShapeError(
            f"expected {', '.join(words[1:])} for each of {boxes.shape[0]} boxes, got {wrong[0]}",
            "AveragePrecision",
        )
    xp = backend_of(boxes).xp
    columns = [xp.expand_dims(xp.astype(other, boxes.dtype), axis=1) for other in others]
    return xp.concat([boxes, *columns], axis=1)


def _apart(tables: Array, lengths: Array) -> list[Array]:
    """Return the table of each image."""
    ends = [0, *accumulate(backend_of(lengths).to_host(lengths).tolist())]
    return [tables[first:last, :] for first, last in pairwise(ends)]


def _read(tables: list[Array]) -> list[HostArray]:
    """Return the images' tables on the host, in one transfer."""
    if not tables:
        return []
    backend = backend_of(tables[0])
    whole = backend.to_host(backend.xp.concat(tables, axis=0)).astype("float64")
    ends = np.cumsum([table.shape[0] for table in tables])
    return np.split(whole, ends[:-1])


def _ious(a: HostArray, b: HostArray) -> HostArray:
    """Return the IoU of each pair of boxes (D, 4) and (G, 4), (D, G)."""
    a, b = a[:, None, :], b[None, :, :]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    overlap = np.clip(sides, 0.0, None).prod(axis=2)
    union = sum((boxes[..., 2:] - boxes[..., :2]).prod(axis=2) for boxes in (a, b)) - overlap
    return np.divide(overlap, union, out=np.zeros_like(union), where=union > 0)


def _matches(detections: HostArray, boxes: HostArray, threshold: float) -> HostArray:
    """Return which detections, in order of descending score, match a true box: the unmatched box
    with the largest IoU."""
    free, right = np.ones(len(boxes), dtype=bool), np.zeros(len(detections), dtype=bool)
    overlaps = _ious(detections[:, :4], boxes)
    for number in range(len(detections)):
        own = np.where(free, overlaps[number], -1.0)
        if len(own) and own.max() >= min(threshold, 1.0 - 1e-10):
            best = len(own) - 1 - int(np.argmax(own[::-1]))  # COCO takes the last of equal IoUs
            free[best], right[number] = False, True
    return right


def _average_precision(images: list[tuple[HostArray, HostArray]], threshold: float) -> float:
    """Return the average precision of one class. ``images`` has its detections and true boxes in
    every image."""
    count = sum(len(boxes) for _, boxes in images)
    score = np.concatenate([detections[:, 4] for detections, _ in images])
    right = np.concatenate([_matches(found, boxes, threshold) for found, boxes in images])
    right = right[np.argsort(-score, kind="stable")]
    hits = np.cumsum(right)
    recall = hits / count
    precision = hits / np.arange(1, len(right) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(best, 0.0)[places].mean())
