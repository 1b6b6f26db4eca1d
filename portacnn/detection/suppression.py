"""Non-maximum suppression: of detections of one object, keep the best.

The result is a mask of the same length as the boxes, and not the indices of those kept: shapes then
do not depend on values, nothing is read to the host, and a batch of images is one call.

Notation: N images, D detections of an image.
"""

from collections.abc import Mapping

from portacnn.arguments import share
from portacnn.detection.boxes import box_iou, check_boxes
from portacnn.errors import ShapeError
from portacnn.ops.dispatch import check_arrays
from portacnn.runtime import Array, HostArray, backend_of, describe


def nms(boxes: Array, scores: Array, iou_threshold: float) -> Array:
    """Return which boxes are kept: those without a kept box of a higher score whose IoU with them
    is greater than ``iou_threshold``. If scores are equal, the first one is kept.

    torchvision.ops.nms returns the indices of the same boxes, by descending score.

    Args:
        boxes: (D, 4), or (N, D, 4) for N images.
        scores: (D,) or (N, D), of the dtype of the boxes.

    Returns:
        A mask of booleans, of the shape of the scores.

    The loop runs D times, over small arrays: pass the best hundred boxes, not all positions of a
    map.
    """
    return _nms("nms", boxes, scores, None, iou_threshold)


def batched_nms(boxes: Array, scores: Array, idxs: Array, iou_threshold: float) -> Array:
    """Return which boxes are kept if only boxes of one class suppress each other.

    Args:
        boxes, scores, iou_threshold: as for ``nms``.
        idxs: whole numbers of the shape of the scores: the class of each box.
    """
    return _nms("batched_nms", boxes, scores, idxs, iou_threshold)


def _nms(name: str, boxes: Array, scores: Array, idxs: Array | None, iou_threshold: float) -> Array:
    iou_threshold = share("iou_threshold", iou_threshold)
    check_arrays(name, boxes=boxes, scores=scores)
    check_boxes(name, 2, boxes=boxes)
    shape = tuple(boxes.shape[:-1])
    for word, array in (("scores", scores), ("idxs", idxs)):
        if array is not None and tuple(array.shape) != shape:
            raise ShapeError(f"expected {word} {shape}, one a box; got {describe(array)}", name)
    if len(shape) > 2:
        raise ShapeError(f"expected boxes (D, 4) or (N, D, 4), got {describe(boxes)}", name)
    xp, count = backend_of(boxes).xp, shape[-1]
    if not count:
        return xp.zeros(shape, dtype=xp.bool, device=boxes.device)
    boxes, scores = xp.reshape(boxes, (-1, count, 4)), xp.reshape(scores, (-1, count))
    # for each pair whether the first suppresses the second, if it is kept itself
    suppresses = box_iou(boxes, boxes) > iou_threshold
    if idxs is not None:
        idxs = xp.reshape(idxs, (-1, count))
        suppresses = suppresses & (idxs[:, :, None] == idxs[:, None, :])
    images = scores.shape[0]
    first = xp.arange(images, dtype=xp.int64, device=boxes.device)[:, None] * count
    order = xp.astype(xp.argsort(scores, axis=1, descending=True, stable=True), xp.int64)
    rank = xp.reshape(xp.astype(xp.argsort(order, axis=1), xp.int64) + first, (-1,))
    # in the order of the scores, rows first and then columns
    rows = xp.reshape(order + first, (-1,))
    for _ in range(2):
        suppresses = xp.take(xp.reshape(suppresses, (images * count, count)), rows, axis=0)
        suppresses = xp.matrix_transpose(xp.reshape(suppresses, (images, count, count)))
    place = xp.arange(count, dtype=xp.int64, device=boxes.device)
    suppresses = suppresses & (place[:, None] < place[None, :])
    kept = xp.ones((images, count), dtype=xp.bool, device=boxes.device)
    for number in range(count - 1):
        kept = kept & ~(suppresses[:, number, :] & kept[:, number : number + 1])
    return xp.reshape(xp.take(xp.reshape(kept, (-1,)), rank, axis=0), shape)


def per_image(found: Mapping[str, Array], keep: Array | None = None) -> list[dict[str, HostArray]]:
    """Return the detections of each image as NumPy arrays, best first, without those that are not
    kept: what ``metrics.AveragePrecision`` takes. Reads all of ``found`` and ``keep`` to the host.

    Args:
        found: arrays (N, D, ...) by name, such as ``center_decode``'s; "scores" (N, D) is one.
        keep: a mask (N, D), such as ``batched_nms``'s. None keeps all.
    """
    backend = backend_of(found["scores"])
    host = {name: backend.to_host(array) for name, array in found.items()}
    mask = None if keep is None else backend.to_host(keep)
    images = []
    for number, scores in enumerate(host["scores"]):
        order = (-scores).argsort(kind="stable")
        if mask is not None:
            order = order[mask[number][order]]
        images.append({name: array[number][order] for name, array in host.items()})
    return images
