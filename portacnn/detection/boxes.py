"""Box arithmetic, as torchvision.ops: conversion, area, IoU, GIoU, clipping.

A box is (x1, y1, x2, y2) in pixels unless a function says otherwise; x2 and y2 are its far edges,
so its width is x2 - x1. Boxes are floating point, and all axes but the last two are batch axes.

Notation: N boxes, M other boxes.
"""

from typing import Any

from portacnn.arguments import one_of
from portacnn.errors import ShapeError
from portacnn.ops.dispatch import check_arrays
from portacnn.runtime import Array, backend_of, describe


def box_convert(boxes: Array, in_fmt: str, out_fmt: str) -> Array:
    """Return boxes (..., 4) in another format.

    Args:
        in_fmt, out_fmt: "xyxy" is (x1, y1, x2, y2), "xywh" (x1, y1, width, height), "cxcywh"
            (centre, width, height).
    """
    one_of("in_fmt", in_fmt, "xyxy", "xywh", "cxcywh")
    one_of("out_fmt", out_fmt, "xyxy", "xywh", "cxcywh")
    check_boxes("box_convert", boxes=boxes)
    if in_fmt == out_fmt:
        return boxes
    xp = backend_of(boxes).xp
    near, far = boxes[..., :2], boxes[..., 2:]
    if in_fmt == "cxcywh":
        near, far = near - far / 2, near + far / 2
    elif in_fmt == "xywh":
        far = near + far
    if out_fmt == "cxcywh":
        near, far = (near + far) / 2, far - near
    elif out_fmt == "xywh":
        far = far - near
    return xp.concat([near, far], axis=-1)


def box_area(boxes: Array) -> Array:
    """Return the area of each box: (..., 4) -> (...)."""
    check_boxes("box_area", boxes=boxes)
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes1: Array, boxes2: Array) -> Array:
    """Return the IoU of each pair, intersection over union: (..., N, 4) and (..., M, 4) ->
    (..., N, M). It is 0 if both boxes are empty."""
    check_boxes("box_iou", 2, boxes1=boxes1, boxes2=boxes2)
    overlap, union = _overlap(boxes1, boxes2)
    return _ratio(overlap, union)


def generalized_box_iou(boxes1: Array, boxes2: Array) -> Array:
    """Return the GIoU of each pair (Rezatofighi et al., 2019): (..., N, 4) and (..., M, 4) ->
    (..., N, M).

    It is the IoU minus the share of the smallest enclosing box that neither box covers, -1 to 1.
    """
    check_boxes("generalized_box_iou", 2, boxes1=boxes1, boxes2=boxes2)
    xp = backend_of(boxes1).xp
    overlap, union = _overlap(boxes1, boxes2)
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    sides = xp.maximum(a[..., 2:], b[..., 2:]) - xp.minimum(a[..., :2], b[..., :2])
    hull = sides[..., 0] * sides[..., 1]
    return _ratio(overlap, union) - _ratio(hull - union, hull)


def clip_boxes_to_image(boxes: Array, size: tuple[int, int]) -> Array:
    """Return boxes (..., 4) cut off at the edges of an image of ``size`` (height, width)."""
    check_boxes("clip_boxes_to_image", boxes=boxes)
    xp = backend_of(boxes).xp
    height, width = size
    edges = xp.asarray([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    return xp.minimum(xp.maximum(boxes, xp.zeros_like(edges)), edges)


def _overlap(boxes1: Array, boxes2: Array) -> tuple[Array, Array]:
    """Return the areas of intersection and union of each pair, (..., N, M)."""
    xp = backend_of(boxes1).xp
    a, b = boxes1[..., :, None, :], boxes2[..., None, :, :]
    sides = xp.minimum(a[..., 2:], b[..., 2:]) - xp.maximum(a[..., :2], b[..., :2])
    sides = xp.maximum(sides, xp.zeros_like(sides))
    overlap = sides[..., 0] * sides[..., 1]
    return overlap, box_area(a) + box_area(b) - overlap


def _ratio(part: Array, whole: Array) -> Array:
    """Return part / whole, or 0 where whole is 0."""
    xp = backend_of(part).xp
    empty = whole == 0
    return xp.where(empty, xp.zeros_like(part), part / xp.where(empty, xp.ones_like(whole), whole))


def check_boxes(name: str, axes: int = 1, **arrays: Any) -> None:
    """Raise ArrayError unless boxes are floating point, of one library, device and dtype, and
    ShapeError unless they are (..., 4) or, with ``axes`` 2, (..., N, 4)."""
    check_arrays(name, **arrays)
    for word, boxes in arrays.items():
        if boxes.ndim < axes or boxes.shape[-1] != 4:
            expected = "(..., 4)" if axes == 1 else "(..., N, 4)"
            raise ShapeError(f"expected {word} {expected}, got {describe(boxes)}", name)
