"""``ConvNetClassifier``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets, unique_labels

from portacnn.data.targets import sample_weights
from portacnn.errors import ArgumentError, LabelError
from portacnn.losses import scores
from portacnn.runtime import Array, HostArray
from portacnn.sklearn.base import ConvNet
from portacnn.sklearn.images import on_host, received


@dataclass(kw_only=True, repr=False, eq=False)
class ConvNetClassifier(ClassifierMixin, ConvNet):
    """Classify images with a convolutional network.

        >>> import numpy as np
        >>> x = np.random.default_rng(0).normal(size=(60, 8, 8))
        >>> t = np.where(x[:, 2:6, 2:6].mean((1, 2)) > 0, "bright", "dark")
        >>> x[t == "bright"] += 1
        >>> net = ConvNetClassifier(epochs=10, random_state=0).fit(x, t)
        >>> net.classes_.tolist(), net.score(x, t) > 0.9
        (['bright', 'dark'], True)

    Args:
        model: "small" (``small_net``), a name in ``portacnn.models.MODELS``, or a function of
            (image_shape, outputs) that returns a ``Model``, built or not. Several processes
            (``n_jobs``) need a function of a module.
        model_params: keyword arguments of the model or the function.
        image_shape: (C, H, W) or (H, W) of a sample. The default: samples of 2 or 3 axes are
            images as they are, 64, 81, 100, ... features are a square, any other number is a row.
        epochs, batch_size, optimizer, lr, augment, validation_split, early_stopping, verbose: see
            ``portacnn.Trainer``. A batch holds at most all images. If none of ``validation_split``
            and ``verbose`` is set, accuracies are not computed after each epoch.
        trainer_params: more keyword arguments of ``Trainer``, such as {"schedule": "cosine"}.
        loss: a name or an object of ``portacnn.losses``, for one class of several.
        random_state: seed of weights, order and dropout; an int gives the same model each time.
        device: where the model is, see ``portacnn.resolve``. The default is the device of the
            images; for NumPy arrays, the variable ``PORTACNN_BACKEND``.
        dtype: of the model, "float32" or "float64".
        class_weight: factors in the loss: a mapping from classes, or "balanced".

    What was fitted on uint8 divides by 255, then and later. Other values are used as they are.

    Attributes:
        classes_: the classes, sorted: a NumPy array.
        model_: the trained ``portacnn.Model``.
        image_shape_: (C, H, W) of the images.
        n_features_in_: C * H * W. ``feature_names_in_``: of a data frame with names.
        history_: ``Trainer.history`` of the last call of ``fit`` or ``partial_fit``.
        n_iter_: number of epochs of ``fit``, or number of calls of ``partial_fit``.
    """

    class_weight: Mapping[Any, float] | Literal["balanced"] | None = None

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train a new model on images with labels (N,), numbers or text. Returns self."""
        images, labels = received(self, X, y, reset=True)
        check_classification_targets(labels)
        classes = np.unique(labels)
        self._begin_with(images, classes)
        return self._train_on(images, labels, sample_weight, once=False)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train for one epoch on these images, and return self.

        The first call needs ``classes``, all that will come. The optimizer's state is kept from
        one call to the next. After ``fit`` it begins anew, and training continues with the weights.
        """
        if isinstance(self.class_weight, str):
            raise ArgumentError(
                'class_weight="balanced" needs all labels at once; pass factors by class'
            )
        first = not hasattr(self, "model_")
        known = self._known_classes(classes, first)
        images, labels = received(self, X, y, reset=first)
        check_classification_targets(labels)
        if len(unknown := np.setdiff1d(labels, known)):
            raise LabelError(f"unknown classes {unknown[:5].tolist()}; add them to `classes`")
        if first:
            self._begin_with(images, known)
        return self._train_on(images, labels, sample_weight, once=True)

    def predict(self, X: Any) -> Array:
        """Return the most likely class of each image, (N,). Text is a NumPy array."""
        y, home = self._outputs(X)
        own = self.model_.home
        with own.active():
            places = own.xp.argmax(y, axis=1)
        if home is None or self.classes_.dtype.kind not in "biuf":
            return self.classes_[own.to_host(places)]
        return home.xp.take(home.asarray(self.classes_), self._returned(places, home), axis=0)

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, (N, classes), in the order of ``classes_``."""
        y, home = self._outputs(X)
        with self.model_.home.active():
            return self._returned(scores(y, "multiclass"), home)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy."""
        return self._score(accuracy_score, X, y, sample_weight)

    def _known_classes(self, classes: Any, first: bool) -> HostArray:
        """Return the classes of ``partial_fit``, from its argument or an earlier call."""
        given = None if classes is None else unique_labels(on_host(classes))
        if first:
            if given is None:
                raise ArgumentError("classes must be passed on the first call to partial_fit.")
            return given
        if given is not None and not np.array_equal(given, self.classes_):
            raise ArgumentError(
                f"`classes={classes!r}` is not the same as on last call to partial_fit, was: "
                f"{self.classes_!r}"
            )
        return self.classes_

    def _begin_with(self, images: Array, classes: HostArray) -> None:
        if len(classes) < 2:
            (only,) = classes.tolist()
            raise LabelError(f"expected at least two classes, got one class: {only!r}")
        self._begin(images, len(classes))
        self.classes_ = classes

    def _train_on(self, images: Array, labels: HostArray, sample_weight: Any, once: bool) -> Self:
        weights = None
        if self.class_weight is not None:
            weights = compute_sample_weight(self.class_weight, labels)
        if sample_weight is not None:
            own = sample_weights(sample_weight, len(labels), dtype="float64")
            weights = own if weights is None else own * weights
        return self._train(images, np.searchsorted(self.classes_, labels), weights, once)
