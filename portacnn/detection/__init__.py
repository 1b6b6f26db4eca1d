"""Detection: box arithmetic, non-maximum suppression, and a one-stage head of centres.

Names are torchvision.ops' where it has them. Everything but ``center_targets`` and ``per_image``
works on arrays of any library, on their device, and reads nothing to the host.
"""

from portacnn.detection.boxes import (
    box_area,
    box_convert,
    box_iou,
    clip_boxes_to_image,
    generalized_box_iou,
)
from portacnn.detection.centers import center_decode, center_targets
from portacnn.detection.suppression import batched_nms, nms, per_image

__all__ = [
    "batched_nms",
    "box_area",
    "box_convert",
    "box_iou",
    "center_decode",
    "center_targets",
    "clip_boxes_to_image",
    "generalized_box_iou",
    "nms",
    "per_image",
]
