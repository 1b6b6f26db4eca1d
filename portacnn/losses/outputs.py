"""Convert a network's outputs to predictions and scores, by task, for metrics and
``predict_classes``.

``multiclass``: one of C classes is right; outputs are logits (N, C, ...) of a softmax.
``multilabel``: each label is 0 or 1, independent of the others; outputs are logits of a sigmoid.
``regression``: outputs are values.
``embedding``: outputs are vectors; there are no predictions.
``detection``: outputs are maps of classes and boxes; ``detection.center_decode`` reads them.
"""

from math import inf, log
from typing import Literal

from portacnn.errors import ArgumentError
from portacnn.ops import sigmoid, softmax
from portacnn.runtime import Array, backend_of

Task = Literal["multiclass", "multilabel", "regression", "embedding", "detection"]
NO_PREDICTION = -1
"""The prediction for an output of NaN: no class, so it is never right."""


def predictions(y: Array, task: str, threshold: float = 0.5) -> Array:
    """Return the predictions for outputs y.

    - multiclass: the class with the largest output, int64 (N, ...); -1 if an output is NaN.
    - multilabel: int64 of y's shape, 1 if sigmoid(y) is above ``threshold``, else 0; -1 if y is
      NaN.
    - regression: y.
    """
    xp = backend_of(y).xp
    if task == "multiclass":
        whole = xp.all(y == y, axis=1)
        return xp.where(whole, xp.astype(xp.argmax(y, axis=1), xp.int64), NO_PREDICTION)
    if task == "multilabel":
        # the logit of the threshold, so that no sigmoid is needed and 0.5 is exactly 0
        limit = log(threshold / (1.0 - threshold)) if 0.0 < threshold < 1.0 else inf
        on = xp.astype(y > (limit if threshold else -inf), xp.int64)
        return xp.where(y == y, on, NO_PREDICTION)
    if task == "regression":
        return y
    if task == "detection":
        raise ArgumentError("boxes are no predictions of a class; use detection.center_decode")
    raise ArgumentError("embeddings have no predictions; use a custom metric")


def scores(y: Array, task: str) -> Array:
    """Return probabilities: the softmax over axis 1 (multiclass) or the sigmoid (multilabel). Other
    outputs are not changed."""
    if task == "multiclass":
        return softmax(y, 1, keep=False)[0]
    if task == "multilabel":
        return sigmoid(y, keep=False)[0]
    return y
