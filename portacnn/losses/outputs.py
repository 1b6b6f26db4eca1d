"""How a network's outputs become predictions and scores, by the task: for metrics and
``predict_classes``.

``multiclass``: one class of C is right; outputs are logits (N, C, ...) of a softmax.
``multilabel``: each output is on or off by itself; outputs are logits of a sigmoid.
``regression``: outputs are values.
``embedding``: outputs are points; nothing is predicted.
"""

from math import inf, log
from typing import Literal

from portacnn.errors import ArgumentError
from portacnn.ops import sigmoid, softmax
from portacnn.runtime import Array, backend_of

Task = Literal["multiclass", "multilabel", "regression", "embedding"]
NO_PREDICTION = -1
"""What is predicted where an output is NaN: no class, so it is never right."""


def predictions(y: Array, task: str, threshold: float = 0.5) -> Array:
    """Return what outputs y say.

    Returns:
        multiclass: the class with the largest output, int64 (N, ...); -1 where one is NaN.
        multilabel: int64 of y's shape, 1 where sigmoid(y) is above ``threshold``, 0 where not, -1
            where y is NaN.
        regression: y.
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
    raise ArgumentError("embeddings predict nothing; choose a metric of your own for them")


def scores(y: Array, task: str) -> Array:
    """Return probabilities: the softmax over axis 1 (multiclass), the sigmoid (multilabel); values
    as they are."""
    if task == "multiclass":
        return softmax(y, 1, keep=False)[0]
    if task == "multilabel":
        return sigmoid(y, keep=False)[0]
    return y
