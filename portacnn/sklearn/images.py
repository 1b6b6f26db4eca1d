"""What the estimators take: images of any library and shape, and targets.

- Samples of 2 or 3 axes are images as they are; (H, W) is one channel.
- Flat samples take the shape ``image_shape``. Without it, a square number of features from 64 on
  is a square of one channel, so 784 features are (1, 28, 28). Any other number is one row,
  (1, 1, features).

Notation: N images, F features, K outputs.
"""

from collections.abc import Sequence
from math import isqrt, prod
from typing import Any

import numpy as np
from sklearn.utils import assert_all_finite, check_array, column_or_1d
from sklearn.utils.validation import validate_data

from portacnn.arguments import wholes
from portacnn.errors import ArgumentError, ArrayError, LabelError, ShapeError
from portacnn.layers.base import Shape
from portacnn.runtime import Array, Backend, HostArray, backend_of, is_float, resolve

_SQUARE = 8
"""Shortest side of a square image that flat samples are taken for."""
_DTYPES = [np.float32, np.float64, np.uint8]  # others become the first


def received(estimator: Any, x: Any, *y: Any, reset: bool, **options: Any) -> tuple[Array, Any]:
    """Check images, and targets if there are any, and return both.

    Args:
        estimator: its ``image_shape`` is read, and ``image_shape_`` and ``n_features_in_`` are set.
        reset: whether they decide what later images must be like.
        options: of ``sklearn.utils.check_X_y``, about the targets.

    Returns:
        Images (N, *image_shape_) of their own library, uint8 or floating point; and the targets on
        the host, None if there are none.
    """
    shape = tuple(getattr(x, "shape", ()))
    sample = shape[1:] if len(shape) > 2 else None
    home = library_of(x)
    xp = np if home is None else home.xp
    if sample is not None:
        x = xp.reshape(x, (shape[0], prod(sample)))
    targets = [on_host(each) for each in y]
    if home is None:
        more = {**options, "dtype": _DTYPES, "reset": reset}
        checked = validate_data(estimator, x, *targets, **more)
        x, t = checked if targets else (checked, None)
    else:
        _check_on_device(estimator, home, x, reset)
        t = _checked_targets(targets[0], x.shape[0], **options) if targets else None
    if reset:
        own = _image_shape(estimator.image_shape, estimator.n_features_in_, sample)
    else:
        own = estimator.image_shape_
    if sample is not None and prod(sample) == prod(own) and own[-len(sample) :] != sample:
        raise ShapeError(f"expected images (N, {str(own)[1:-1]}), got shape {shape}")
    estimator.image_shape_ = own
    return xp.reshape(x, (x.shape[0], *own)), t


def _check_on_device(estimator: Any, home: Backend, x: Array, reset: bool) -> None:
    """Check an array (N, F) of another library than NumPy as scikit-learn does NumPy's: one boolean
    is read from the device."""
    xp = home.xp
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeError(
            f"{type(estimator).__name__} expects images (N, features) or (N, C, H, W), at least "
            f"one; got shape {tuple(x.shape)}"
        )
    if xp.isdtype(x.dtype, "complex floating"):
        raise ArrayError("Complex data not supported")
    if is_float(xp, x.dtype) and not bool(home.to_host(xp.all(xp.isfinite(x)))):
        raise ArgumentError("Input X contains NaN or infinity")
    validate_data(estimator, x, reset=reset, skip_check_array=True)  # the number of features


def _checked_targets(
    y: Any, count: int, multi_output: bool = False, y_numeric: bool = False
) -> HostArray:
    """Return targets as ``sklearn.utils.check_X_y`` does."""
    if multi_output:
        y = check_array(y, ensure_2d=False, dtype="numeric" if y_numeric else None, input_name="y")
    else:
        y = column_or_1d(y, warn=True)
        assert_all_finite(y, input_name="y")
    if len(y) != count:
        raise LabelError(f"expected a target for each of {count} images, got {len(y)}")
    return y


def _image_shape(wanted: Sequence[int] | None, features: int, sample: Shape | None) -> Shape:
    """Return the shape (C, H, W) of the images that are fitted.

    Args:
        wanted: the estimator's ``image_shape``.
        features: values of a sample.
        sample: shape of a sample that is not flat.
    """
    if wanted is not None:
        shape = wholes("image_shape", wanted, 1)
        if prod(shape) != features or len(shape) not in (2, 3):
            raise ShapeError(
                f"image_shape={wanted} has {prod(shape)} values, but the samples have {features}; "
                "image_shape is (C, H, W) or (H, W) of one sample"
            )
    elif sample is not None:
        shape = sample
        if len(shape) > 3:
            raise ShapeError(f"expected images (N, C, H, W), got samples of shape {shape}")
    else:
        side = isqrt(features)
        square = side >= _SQUARE and side * side == features
        shape = (side, side) if square else (1, features)
    return (1,) * (3 - len(shape)) + shape


def library_of(x: Any) -> Backend | None:
    """Return the backend of an array of another library than NumPy, on its device. None for
    everything that becomes a NumPy array."""
    if not hasattr(x, "__dlpack__"):
        return None
    try:
        found = backend_of(x)
    except ArrayError:
        return None
    return None if found.name == "numpy" else resolve(f"{found.name}:{found.place(x.device)}")


def on_host(x: Any) -> Any:
    """Return an array of another library as a NumPy array, and everything else as it is."""
    home = library_of(x)
    return x if home is None else home.to_host(x)
