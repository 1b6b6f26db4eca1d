"""A one-stage head of centres: each cell of a map says whether an object's centre is near, of which
class, and how far away the object's four edges are (FCOS, Tian et al., 2019, with one map).

The network's output is (N, 1 + C + 4, H, W): logits of the background and of C classes, and the
distances from the cell's centre to the edges x1, y1, x2, y2 of the box, in cells. Cell (i, j) has
its centre at x = (j + 0.5) * stride, y = (i + 0.5) * stride.

Notation: N images, C classes, H/W height and width of the map, K detections, G true boxes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from portacnn.arguments import positive, whole
from portacnn.detection.boxes import clip_boxes_to_image
from portacnn.errors import ArgumentError, LabelError, ShapeError
from portacnn.ops.dispatch import check_arrays
from portacnn.runtime import Array, HostArray, backend_of, describe


def center_targets(
    images: Sequence[Mapping[str, Any]],
    grid: tuple[int, int],
    stride: int,
    *,
    radius: float = 1.5,
    dtype: str = "float32",
) -> HostArray:
    """Return the targets of a map, (N, 5, H, W), on the host: 0 for background or the class + 1,
    then the distances to the four edges in cells, which are 0 for background.

    A cell belongs to the box whose centre is nearest, if that is less than ``radius`` cells away
    along both axes.

    Args:
        images: for each image a mapping with "boxes" (G, 4) in pixels and "labels" (G,), NumPy.
        grid: (H, W).
        stride: pixels of a cell.

    Raises:
        ShapeError, LabelError: boxes or labels do not fit.
        ArgumentError: a box is not finite, or an argument is out of range.
    """
    stride, radius = whole("stride", stride, 1), positive("radius", radius)
    height, width = (whole("grid", side, 1) for side in grid)
    y, x = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    cells = np.stack([x, y], axis=-1)  # (H, W, 2)
    out = np.zeros((len(images), 5, height, width), dtype=dtype)
    for number, image in enumerate(images):
        boxes, labels = np.asarray(image["boxes"], dtype="float64"), np.asarray(image["labels"])
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ShapeError(
                f"image {number}: expected boxes (G, 4), got {boxes.shape}", "center_targets"
            )
        if labels.shape != boxes.shape[:1] or (len(labels) and labels.min() < 0):
            raise LabelError(
                f"image {number}: expected a class of 0 or more for each of {len(boxes)} boxes, "
                f"got labels of shape {labels.shape}",
                "center_targets",
            )
        if not np.isfinite(boxes).all():
            raise ArgumentError(f"image {number}: boxes must be finite", "center_targets")
        if not len(boxes):
            continue
        boxes = boxes / stride
        away = np.abs(cells[:, :, None] - (boxes[:, :2] + boxes[:, 2:]) / 2)  # (H, W, G, 2)
        far = np.where((away < radius).all(axis=-1), (away**2).sum(axis=-1), np.inf)
        nearest = far.argmin(axis=2)
        own = np.isfinite(far.min(axis=2))
        box = boxes[nearest]  # (H, W, 4)
        edges = np.concatenate([cells - box[..., :2], box[..., 2:] - cells], axis=-1)
        out[number, 0] = np.where(own, labels[nearest] + 1, 0)
        out[number, 1:] = np.where(own[..., None], edges, 0.0).transpose(2, 0, 1)
    return out


def center_decode(y: Array, stride: int, *, top: int = 100) -> dict[str, Array]:
    """Return the detections of the best cells of a map, on its device.

    Args:
        y: the network's output (N, 1 + C + 4, H, W).
        stride: pixels of a cell.
        top: K, the number of detections of an image, at most H * W.

    Returns:
        By name, best scores first: "boxes" (N, K, 4) in pixels, within the image of H * stride by
        W * stride; "scores" (N, K), the probability of the class; "labels" (N, K), int64. Boxes of
        one object are not joined: see ``batched_nms``.
    """
    stride, top = whole("stride", stride, 1), whole("top", top, 1)
    check_arrays("center_decode", y=y)
    if y.ndim != 4 or y.shape[1] < 6:
        raise ShapeError(
            f"expected maps (N, 1 + classes + 4, H, W), got {describe(y)}", "center_decode"
        )
    xp = backend_of(y).xp
    n, channels, height, width = y.shape
    top = min(top, height * width)
    y = xp.permute_dims(y, (0, 2, 3, 1))
    logits, edges = y[..., : channels - 4], y[..., channels - 4 :]
    logits = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    chances = (logits / xp.sum(logits, axis=-1, keepdims=True))[..., 1:]
    across = (xp.arange(width, dtype=y.dtype, device=y.device) + 0.5)[None, :]
    down = (xp.arange(height, dtype=y.dtype, device=y.device) + 0.5)[:, None]
    cells = xp.stack(xp.broadcast_arrays(across, down), axis=-1)
    far = xp.maximum(cells + edges[..., 2:], cells - edges[..., :2])  # never before the near edge
    boxes = xp.concat([cells - edges[..., :2], far], axis=-1) * stride
    boxes = clip_boxes_to_image(boxes, (height * stride, width * stride))
    scores = xp.reshape(xp.max(chances, axis=-1), (n, height * width))
    labels = xp.astype(xp.argmax(chances, axis=-1), xp.int64)
    order = xp.argsort(scores, axis=1, descending=True, stable=True)[:, :top]
    first = xp.arange(n, dtype=xp.int64, device=y.device)[:, None] * (height * width)
    best = xp.reshape(xp.astype(order, xp.int64) + first, (-1,))
    return {
        "boxes": xp.reshape(xp.take(xp.reshape(boxes, (-1, 4)), best, axis=0), (n, top, 4)),
        "scores": xp.reshape(xp.take(xp.reshape(scores, (-1,)), best, axis=0), (n, top)),
        "labels": xp.reshape(xp.take(xp.reshape(labels, (-1,)), best, axis=0), (n, top)),
    }
