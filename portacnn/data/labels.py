"""Convert labels to class indices, and check them on the host."""

import numpy as np

from portacnn.errors import LabelError
from portacnn.runtime import HostArray


def one_hot(targets: HostArray) -> HostArray:
    """Return which places of (N, classes, *S) are one-hot, one 1 and the rest 0: bool (N, *S)."""
    ones, others = np.count_nonzero(targets == 1, axis=1), np.count_nonzero(targets, axis=1)
    return (ones == 1) & (others == 1)


def class_indices(labels: HostArray, count: int, classes: int, what: str = "labels") -> HostArray:
    """Return labels, integers (N,) or one-hot (N, classes), as int64 (N,).

        >>> class_indices([[0, 1, 0], [0, 0, 1]], 2, 3).tolist()
        [1, 2]

    Args:
        labels: integers (N,) or one-hot (N, classes).
        count: N, the number of samples.
        classes: the number of classes.
        what: the argument's name, for the message; "" for a caller that adds it.

    Raises:
        LabelError: if length or shape are wrong, a label is outside 0..classes-1, a row is not
            one-hot, or labels are not whole numbers.
    """
    labels, prefix = np.asarray(labels), f"{what}: " if what else ""
    if labels.ndim not in (1, 2) or labels.shape[0] != count:
        raise LabelError(
            f"{prefix}expected {count} labels, (N,) or one-hot (N, {classes}), got "
            f"shape {labels.shape}"
        )
    if labels.ndim == 2:
        if labels.shape[1] != classes:
            raise LabelError(
                f"{prefix}one-hot labels must have {classes} columns, the network's outputs, got "
                f"{labels.shape[1]}"
            )
        rows = one_hot(labels)
        if not rows.all():
            raise LabelError(
                f"{prefix}row {int(np.argmin(rows))} is not one-hot: {labels[int(np.argmin(rows))]}"
            )
        return labels.argmax(axis=1)
    if labels.dtype.kind not in "iu":
        raise LabelError(f"{prefix}expected whole numbers 0..{classes - 1}, got {labels.dtype}")
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise LabelError(
            f"{prefix}label {labels[at]} at index {at} is outside 0..{classes - 1}; the network "
            f"has {classes} outputs"
        )
    return labels.astype(np.int64)
