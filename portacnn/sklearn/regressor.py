"""``ConvNetRegressor``."""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score

from portacnn.errors import LabelError
from portacnn.losses import Loss
from portacnn.runtime import Array
from portacnn.sklearn.base import ConvNet
from portacnn.sklearn.images import received


@dataclass(kw_only=True, repr=False, eq=False)
class ConvNetRegressor(RegressorMixin, ConvNet):
    """Predict values of images with a convolutional network: one value each, or several.

        >>> import numpy as np
        >>> x = np.random.default_rng(0).random((80, 8, 8))
        >>> y = 4 * x[:, :4].mean((1, 2)) - 2
        >>> net = ConvNetRegressor(epochs=40, random_state=0).fit(x, y)
        >>> net.score(x, y) > 0.5
        True

    Targets should be near 0 and 1 in size, as for other networks: see scikit-learn's
    ``TransformedTargetRegressor``. Arguments and attributes are those of ``ConvNetClassifier``,
    except ``class_weight`` and ``classes_``. ``loss`` is "mse", "l1", "huber", "smooth_l1", or
    an object of ``portacnn.losses``.
    """

    loss: str | Loss = "mse"

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train a new model on images with targets (N,) or (N, K). Returns self."""
        return self._fit(X, y, sample_weight, first=True, once=False)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one epoch on these images, and return self. See ``ConvNetClassifier``."""
        return self._fit(X, y, sample_weight, first=not hasattr(self, "model_"), once=True)

    def _fit(self, X: Any, y: Any, sample_weight: Any, first: bool, once: bool) -> Self:
        images, targets = received(self, X, y, reset=first, multi_output=True, y_numeric=True)
        shape = targets.shape[1:]
        if first:
            self._begin(images, prod(shape))
            self._target_shape = shape
        elif shape != self._target_shape:
            raise LabelError(f"expected targets (N, {str(self._target_shape)[1:]}, got {shape}")
        return self._train(images, targets, sample_weight, once)

    def predict(self, X: Any) -> Array:
        """Return the values, (N,) or (N, K) as the targets were."""
        y, home = self._outputs(X)
        if self._target_shape == ():
            with self.model_.home.active():
                y = self.model_.home.xp.reshape(y, (y.shape[0],))
        return self._returned(y, home)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R², the share of the targets' variance that is predicted."""
        return self._score(r2_score, X, y, sample_weight)
