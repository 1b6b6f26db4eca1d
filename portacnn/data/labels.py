"""Labels as people hand them over, made into class indices and checked on the host."""

import numpy as np

from portacnn.errors import LabelError
from portacnn.runtime import HostArray


def class_indices(labels: HostArray, count: int, classes: int, what: str = "labels") -> HostArray:
    """Integers (N,) or one-hot (N, classes) -> int64 (N,).

    Args:
        labels: what came.
        count: N, how many samples they belong to.
        classes: how many there are.
        what: their name, for the message.

    Raises:
        LabelError: another length or shape, a label outside 0..classes-1, rows that are not
            one-hot, fractions.
    """
    labels = np.asarray(labels)
    if labels.ndim not in (1, 2) or labels.shape[0] != count:
        raise LabelError(
            f"{what}: expected {count} labels, (N,) or one-hot (N, {classes}), got "
            f"shape {labels.shape}"
        )
    if labels.ndim == 2:
        if labels.shape[1] != classes:
            raise LabelError(
                f"{what}: one-hot labels have {labels.shape[1]} columns, the network has {classes} "
                "outputs"
            )
        rows = (np.count_nonzero(labels == 1, axis=1) == 1) & (
            np.count_nonzero(labels, axis=1) == 1
        )
        if not rows.all():
            raise LabelError(
                f"{what}: row {int(np.argmin(rows))} is not one-hot: {labels[int(np.argmin(rows))]}"
            )
        return labels.argmax(axis=1)
    if labels.dtype.kind not in "iu":
        raise LabelError(f"{what}: expected whole numbers 0..{classes - 1}, got {labels.dtype}")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise LabelError(
            f"{what}: label {labels[at]} at index {at} is outside 0..{classes - 1}, "
            "the network's outputs"
        )
    return labels.astype(np.int64)
