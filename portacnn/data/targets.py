"""Checks of targets: labels, masks and values are checked on the host and converted for the device.

Each function takes all targets of a data set as a NumPy array, and returns an array that the loss
accepts. If they do not fit, it raises an error that says why, and which loss fits. ``shape`` is the
shape of the network's output for one sample, (C,) or (C, *S).

Notation: N samples, C outputs (classes, labels, values), S the image's axes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from portacnn.arguments import as_float, as_int, told
from portacnn.data.labels import class_indices, one_hot
from portacnn.errors import ArgumentError, ArrayError, LabelError, NotFiniteError
from portacnn.runtime import HostArray, backend_of

Shape = tuple[int, ...]
_SUMS_TO_ONE = 1e-3  # how far the shares of one sample may be from 1: what float16 makes of them


def on_host(targets: Any) -> HostArray:
    """Return arrays of any library, or lists, as a NumPy array of numbers. Raises LabelError."""
    try:
        host = backend_of(targets).to_host(targets)
    except ArrayError:
        if hasattr(targets, "dtype"):
            raise
        try:
            host = np.asarray(targets)
        except ValueError:
            raise LabelError("the targets are lists of unlike lengths, not an array") from None
    if host.dtype.kind not in "biuf":
        hint = ""
        if host.dtype.kind in "USO" and host.size and isinstance(host.flat[0], str | bytes):
            hint = "; for names of classes: names, t = numpy.unique(targets, return_inverse=True)"
        raise LabelError(f"expected numbers, got {'text' if hint else host.dtype}{hint}")
    return host


def check_length(targets: HostArray, count: int | None) -> None:
    """Raise LabelError unless there are ``count`` targets (None: any number), one for each
    sample."""
    if targets.ndim == 0 or (count is not None and targets.shape[0] != count):
        got = "a single number" if targets.ndim == 0 else f"shape {targets.shape}"
        raise LabelError(f"expected a target for each of {count or 'the'} samples, got {got}")


def _kind(targets: HostArray, shape: Shape) -> str:
    """Return in words what targets look like, and the loss for them."""
    whole = targets.dtype.kind in "biu" or bool(np.all(targets == np.floor(targets)))
    binary = whole and bool(np.all((targets == 0) | (targets == 1)))
    if targets.ndim == 1 or targets.shape[1:] == shape[1:] != ():
        if whole and targets.dtype.kind != "f":
            return 'class indices; use loss="cross_entropy"'
        return 'values; use loss="mse"'
    if binary:
        return 'each output on or off; use loss="bce_with_logits"'
    return 'values; use loss="mse"'


def _refuse_floats(targets: HostArray, shape: Shape, loss: str) -> LabelError:
    cure = "targets.astype('int64') if these are classes, loss=\"mse\" if they are values"
    return LabelError(
        f"{loss} expects whole numbers 0..{shape[0] - 1}, got {targets.dtype}; use {cure}"
    )


def classes_or_shares(
    targets: HostArray,
    shape: Shape,
    *,
    dtype: str,
    ignore_index: int | None = None,
    loss: str = "CrossEntropy",
    soft: bool = True,
) -> HostArray:
    """Check targets of which one class is right: class indices (N, *S), one-hot (N, C, *S), or
    with ``soft`` shares (N, C, *S) that sum to 1.

    Returns:
        Indices: int64 (N,), or for maps uint8 where they came so, else int64. Shares: ``dtype``.

    Raises:
        LabelError: anything else.
    """
    classes, size = shape[0], tuple(shape[1:])
    n = targets.shape[0]
    by_index, by_class = (n, *size), (n, *shape)
    if classes == 1:
        raise LabelError(
            f"{loss} chooses among classes, but the network has one output; it needs an output for "
            'each class, or use loss="bce_with_logits" (on or off) or "mse" (a value)'
        )
    if targets.shape == by_index:
        if targets.dtype.kind not in "iub":
            raise _refuse_floats(targets, shape, loss)
        return _indices(targets, classes, ignore_index)
    if targets.shape != by_class:
        raise LabelError(
            f"{loss} expects class indices {by_index} or shares of classes {by_class} for outputs "
            f"of {shape}, got shape {targets.shape}"
            f"{_reshaped(targets, by_index) or _masks(targets, shape)}"
        )
    rows = one_hot(targets)
    if rows.all():
        labels = targets.argmax(axis=1)
        return labels if labels.ndim == 1 or classes > 256 else labels.astype(np.uint8)
    if targets.dtype.kind != "f" or not soft:
        _refuse_row(targets, rows, loss, soft)
    _refuse_not_finite(targets)
    total = targets.sum(axis=1, dtype=np.float64)
    shares = (targets >= 0).all(axis=1) & (np.abs(total - 1.0) <= _SUMS_TO_ONE)
    if not shares.all():
        _refuse_row(targets, shares, loss, soft)
    return targets.astype(dtype)


def _refuse_row(targets: HostArray, good: HostArray, loss: str, soft: bool) -> None:
    at = tuple(int(i) for i in np.argwhere(~good)[0])
    row = targets[(at[0], slice(None), *at[1:])]
    place = f"row {at[0]}" if len(at) == 1 else f"the place {at}"
    kinds = "one-hot" + (", nor shares that sum to 1" if soft else "")
    hint = (
        '; for several labels at once use loss="bce_with_logits"'
        if bool(np.all((row == 0) | (row == 1)))
        else '; for values use loss="mse"'
    )
    raise LabelError(f"{loss}: {place} is not {kinds}: {told(row[:20])}{hint}")


def _indices(targets: HostArray, classes: int, ignore_index: int | None) -> HostArray:
    """Return whole numbers in 0..classes-1, or ``ignore_index``. Raises LabelError."""
    if ignore_index is None and targets.ndim == 1:
        try:
            return class_indices(targets, len(targets), classes, "")
        except LabelError as error:
            error.message += _hint(targets, classes)
            raise
    wrong = (targets < 0) | (targets >= classes)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        ignoring = (
            f", and is not ignore_index={ignore_index}"
            if ignore_index is not None
            else _hint(targets, classes)
            or f"; to leave such places out: CrossEntropy(ignore_index={targets[at]})"
        )
        raise LabelError(
            f"label {targets[at]} at {at[0] if len(at) == 1 else at} is outside 0..{classes - 1}, "
            f"the network's outputs{ignoring}"
        )
    if targets.ndim > 1 and targets.dtype.kind in "ub" and targets.dtype.itemsize == 1:
        return targets.astype(np.uint8)  # masks take an eighth of int64's memory
    return targets.astype(np.int64)


def _hint(targets: HostArray, classes: int) -> str:
    """Return what to do with class indices some of which are none, "" if that is not clear."""
    if targets.dtype.kind == "b":
        return "; use targets.astype('int64')"
    low, high = int(targets.min()), int(targets.max())
    if (low, high) == (1, classes):
        return "; classes are numbered from 0: use targets - 1"
    if classes == 2 and _two_valued(targets, high):
        return f"; for 0 and {high} use targets > 0, as whole numbers"
    if targets.ndim == 1 and (low < 0 or high == 255):
        which = low if low < 0 else high
        return f"; to leave such samples out: CrossEntropy(ignore_index={which})"
    return ""


def _two_valued(targets: HostArray, high: Any) -> bool:
    """Return whether all of these whole numbers are 0 or ``high``."""
    return (
        targets.dtype.kind in "iu" and high > 1 and bool(np.all((targets == 0) | (targets == high)))
    )


def _reshaped(targets: HostArray, wanted: Shape) -> str:
    """Return how to make targets of this shape, if only axes of length 1 are in excess."""
    if targets.ndim > len(wanted) and targets.size == np.prod(wanted):
        return f"; use targets.reshape({wanted})"
    return ""


def _masks(targets: HostArray, shape: Shape) -> str:
    """Return which network fits, if these are masks and the network has an output for each class
    of the whole image."""
    if len(shape) == 1 and targets.ndim == 3:
        return "; masks fit a network with a map for each class, such as models.UNet"
    return ""


def on_or_off(
    targets: HostArray, shape: Shape, *, dtype: str, loss: str = "BCEWithLogits", soft: bool = True
) -> HostArray:
    """Check targets that are on or off independently of each other: 0, 1, or with ``soft`` a
    probability, shaped as the outputs (N, *shape); for one output also (N, *S).

    Returns:
        (N, *shape): uint8 where there are only 0 and 1, else ``dtype``.

    Raises:
        LabelError: anything else.
    """
    wanted = (targets.shape[0], *shape)
    if shape[0] == 1 and targets.shape == (targets.shape[0], *shape[1:]):
        targets = targets.reshape(wanted)
    if targets.shape != wanted:
        raise LabelError(
            f"{loss} expects 0 or 1 for each output, shape {wanted}; got shape {targets.shape}, "
            f"which looks like {_kind(targets, shape)}"
        )
    binary = (targets == 0) | (targets == 1)
    if binary.all():
        return targets.astype(np.uint8)
    inside = (targets >= 0) & (targets <= 1)  # NaN is neither
    if not soft or not inside.all():
        at = tuple(int(i) for i in np.argwhere(~(inside if soft else binary))[0])
        wants = "values from 0 to 1" if soft else "0 or 1"
        looks = f"the targets look like {_kind(targets, shape)}"
        if _two_valued(targets, targets[at]):
            looks = f"for 0 and {targets[at]} use targets > 0"
        raise LabelError(f"{loss} expects {wants}, got {targets[at]} at {at}; {looks}")
    return targets.astype(dtype)


def values(targets: HostArray, shape: Shape, *, dtype: str, loss: str = "MSE") -> HostArray:
    """Check targets that are values, shaped as the outputs (N, *shape); for one output also
    (N, *S).

    Returns:
        (N, *shape) of ``dtype``.

    Raises:
        LabelError: another shape. NotFiniteError: NaN or infinity, or beyond the dtype's range.
    """
    wanted = (targets.shape[0], *shape)
    if shape[0] == 1 and targets.shape == (targets.shape[0], *shape[1:]):
        targets = targets.reshape(wanted)
    if targets.shape != wanted:
        looks = _kind(targets, shape)
        hint = f"; they look like {looks}" if "mse" not in looks else ""
        hint = _reshaped(targets, wanted) or hint
        raise LabelError(
            f"{loss} expects a value for each output, shape {wanted}; got shape "
            f"{targets.shape}{hint}"
        )
    _refuse_not_finite(targets)
    with np.errstate(over="ignore"):
        made = targets.astype(dtype)
    if not np.isfinite(made).all():
        raise NotFiniteError(
            f"the targets go up to {np.abs(targets).max():.3g}, beyond the range of {dtype}; scale "
            "them"
        )
    return made


def center_maps(targets: HostArray, shape: Shape, *, dtype: str, loss: str) -> HostArray:
    """Check targets of ``detection.center_targets`` for outputs (1 + classes + 4, H, W).

    Returns:
        (N, 5, H, W) of ``dtype``.

    Raises:
        LabelError: another shape, or a class that the outputs do not have. NotFiniteError.
    """
    wanted, most = (targets.shape[0], 5, *shape[1:]), shape[0] - 5
    if targets.shape != wanted:
        raise LabelError(
            f"{loss} expects targets {wanted}, got {targets.shape}; make them by "
            f"detection.center_targets(boxes, {tuple(shape[1:])}, stride)"
        )
    _refuse_not_finite(targets)
    classes = targets[:, 0]
    wrong = (classes < 0) | (classes > most) | (classes != np.floor(classes))
    if wrong.any():
        raise LabelError(
            f"{loss} expects 0 for background or 1..{most} in channel 0 of targets for "
            f"{shape[0]} outputs; got {classes[wrong][0]:g}"
        )
    return targets.astype(dtype)


def kinds(targets: HostArray, *, loss: str, apart: bool = False) -> HostArray:
    """Return integers (N,), equal for samples of one class, as int64.

    Args:
        apart: whether at least two classes are required.

    Raises:
        LabelError: for other targets, or if every class has one sample, so that there is no loss.
    """
    if targets.ndim != 1 or targets.dtype.kind not in "iub":
        hint = '; for values use loss="mse"' if targets.dtype.kind == "f" else ""
        raise LabelError(
            f"{loss} expects integers (N,), equal for samples of one class; got {targets.dtype} "
            f"of shape {targets.shape}{hint}"
        )
    found = len(np.unique(targets))
    if 1 < len(targets) == found:
        raise LabelError(
            f"{loss} compares samples of one class, but all {found} targets differ; two views of "
            "an image, or the images of a class, need equal targets"
        )
    if apart and 1 == found < len(targets):
        raise LabelError(f"{loss} needs two classes or more, but all targets are {targets[0]}")
    return targets.astype(np.int64)


def _refuse_not_finite(targets: HostArray) -> None:
    if targets.dtype.kind == "f" and not np.isfinite(targets).all():
        at = tuple(int(i) for i in np.argwhere(~np.isfinite(targets))[0])
        raise NotFiniteError(f"the targets hold {targets[at]} at {at}; clean the data first")


def sample_weights(weight: Any, count: int, *, dtype: str) -> HostArray:
    """Return a factor for each of ``count`` samples, (count,) of ``dtype``.

    Raises:
        ArgumentError: another shape, negative or not finite, or all of them 0.
    """
    if isinstance(weight, str):
        raise ArgumentError(
            f"sample_weight must be a number for each of {count} samples, got {told(weight)}; "
            'class_weight="balanced" takes a word'
        )
    try:
        host = on_host(weight)
    except LabelError as error:
        raise ArgumentError(f"sample_weight: {error.message.partition(';')[0]}") from None
    if host.shape != (count,):
        raise ArgumentError(
            f"sample_weight must have a number for each of {count} samples, got shape {host.shape}"
        )
    with np.errstate(over="ignore"):
        made = host.astype(dtype)
    if not (np.isfinite(made).all() and (made >= 0).all()):
        raise ArgumentError("sample_weight must be finite numbers of 0 or more")
    if not made.any():
        raise ArgumentError("sample_weight is zero for every sample; nothing would be learned")
    return made


def class_weights(
    what: str | Mapping[int, float] | Sequence[float] | HostArray,
    targets: Any,
    classes: int,
    *,
    ignore_index: int | None = None,
) -> tuple[float, ...]:
    """Return a factor for each class.

    Args:
        what: a number for each class, a mapping from classes ({3: 5.0}; others have 1), or
            "balanced".
        targets: class indices, which "balanced" counts.
        ignore_index: targets of this value are not counted.

    "balanced" is scikit-learn's: N / (classes * count of the class) for class indices. A class
    without a sample has 1.

    Raises:
        ArgumentError: another word, type, length or class, numbers that are negative or not
            finite.
    """
    if isinstance(what, str):
        if what != "balanced":
            raise ArgumentError(f'class_weight must be numbers or "balanced", got {told(what)}')
        labels = on_host(targets)
        if labels.dtype.kind not in "iub":
            raise ArgumentError(
                f'class_weight="balanced" counts class indices, got targets of {labels.dtype}'
            )
        counted = labels[labels != ignore_index] if ignore_index is not None else labels
        found = np.bincount(counted.reshape(-1), minlength=classes)
        return tuple(counted.size / (classes * int(n)) if n else 1.0 for n in found)
    if isinstance(what, Mapping):
        named = {as_int(key): value for key, value in what.items()}
        if strange := [key for key in what if as_int(key) not in range(classes)]:
            raise ArgumentError(
                f"class_weight names class {told(strange[0])}; there are 0..{classes - 1}"
            )
        numbers = [named.get(index, 1.0) for index in range(classes)]
    else:
        listed = what.tolist() if hasattr(what, "tolist") else what
        if not isinstance(listed, Iterable):
            raise ArgumentError(f"class_weight must have a number for each class, got {told(what)}")
        numbers = list(listed)
    if len(numbers) != classes:
        raise ArgumentError(
            f"class_weight must have a number for each of {classes} classes, got {len(numbers)}"
        )
    made = tuple(as_float(number) for number in numbers)
    if not all(0.0 <= number < float("inf") for number in made) or not any(made):
        raise ArgumentError(
            f"class_weight must be finite numbers of 0 or more, one above 0; got {told(what)}"
        )
    return made
