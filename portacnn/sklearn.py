"""scikit-learn's interface to networks: ``ConvNetClassifier`` and ``ConvNetRegressor``.

    from portacnn.sklearn import ConvNetClassifier

    net = ConvNetClassifier(epochs=10, random_state=0).fit(x_train, t_train)
    net.predict(x_test), net.score(x_test, t_test)

They work within pipelines, grid searches and cross-validation, and are pickled by joblib. This
module needs scikit-learn: ``pip install "portacnn[sklearn]"``. The rest of portacnn does not import
it. docs/sklearn.md shows how it is used.

Images are arrays (N, features), (N, H, W) or (N, C, H, W):

- Samples of 2 or 3 axes are images as they are; (H, W) is one channel.
- Flat samples take the shape ``image_shape``. Without it, a square number of features from 64 on
  is a square of one channel, so 784 features are (1, 28, 28). Any other number is one row,
  (1, 1, features).
- What was fitted on uint8 divides by 255, then and later. Other values are used as they are.

Arrays of another library than NumPy stay on their device, and predictions are arrays of that
library there. Data frames, lists and arrays of unknown libraries become NumPy arrays.

Notation: N images, F features, K outputs.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isqrt, prod
from typing import Any, Literal, Self

import numpy as np

from portacnn.arguments import fraction, whole, wholes
from portacnn.errors import ArgumentError, ArrayError, DependencyError, LabelError, ShapeError
from portacnn.layers import Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU
from portacnn.layers.base import Shape
from portacnn.losses import Loss, scores
from portacnn.models import Model, Normalize, make_model
from portacnn.optim import make_optimizer
from portacnn.runtime import Array, Backend, HostArray, backend_of, is_float, resolve
from portacnn.training import EarlyStopping, Trainer

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.utils import check_random_state, compute_sample_weight
    from sklearn.utils.multiclass import (
        _check_partial_fit_first_call,
        check_classification_targets,
    )
    from sklearn.utils.validation import (
        _check_sample_weight,
        _check_y,
        check_is_fitted,
        validate_data,  # new in 1.6
    )
except ImportError as error:
    raise DependencyError(
        'portacnn.sklearn needs scikit-learn 1.6 or later: pip install "portacnn[sklearn]"'
    ) from error

__all__ = ["ConvNetClassifier", "ConvNetRegressor", "small_net"]

_SQUARE = 8
"""Shortest side of a square image that flat samples are taken for."""
_DTYPES = [np.float32, np.float64, np.uint8]  # others become the first

MakeModel = Callable[[Shape, int], Layer]


def small_net(image_shape: Sequence[int], outputs: int) -> Model:
    """Return an unbuilt network for images of any size: two convolutions, each with a max-pooling
    of the axes that are at least 4 long, and two linear layers.

    >>> net = small_net((1, 1, 20), 3).build((1, 1, 20), device="cpu", seed=0)
    >>> net.output_shape
    (3,)
    """
    layers: dict[str, Layer] = {}
    size = tuple(image_shape[1:])
    for number, filters in enumerate((16, 32), start=1):
        kernel = tuple(min(side, 3) | 1 if side > 1 else 1 for side in size)
        pool = tuple(2 if side >= 4 else 1 for side in size)
        layers[f"conv{number}"] = Conv2d(
            None, filters, kernel, padding=tuple(side // 2 for side in kernel)
        )
        layers[f"relu{number}"] = ReLU()
        if max(pool) > 1:
            layers[f"pool{number}"] = MaxPool2d(pool)
        size = tuple(side // by for side, by in zip(size, pool, strict=True))
    return Model(
        **layers, flatten=Flatten(), fc1=Linear(None, 64), relu3=ReLU(), fc2=Linear(None, outputs)
    )


class _ConvNet(BaseEstimator):
    """What both estimators share: images, the network, and its training."""

    loss: str | Loss = "cross_entropy"
    model_: Model
    image_shape_: Shape

    def __init__(
        self,
        model: str | MakeModel,
        model_params: Mapping[str, Any] | None,
        image_shape: Sequence[int] | None,
        epochs: int,
        batch_size: int,
        optimizer: str,
        lr: float | None,
        augment: Any,
        validation_split: float | None,
        early_stopping: EarlyStopping | int | None,
        trainer_params: Mapping[str, Any] | None,
        random_state: Any,
        device: str | Backend | None,
        dtype: str,
        verbose: bool,
    ) -> None:
        self.model = model
        self.model_params = model_params
        self.image_shape = image_shape
        self.epochs = epochs
        self.batch_size = batch_size
        self.optimizer = optimizer
        self.lr = lr
        self.augment = augment
        self.validation_split = validation_split
        self.early_stopping = early_stopping
        self.trainer_params = trainer_params
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.verbose = verbose

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    # --- images -----------------------------------------------------------------------------------

    def _received(self, x: Any, *y: Any, reset: bool, **options: Any) -> tuple[Array, Any]:
        """Check images, and targets if there are any, and return both.

        Args:
            reset: whether they decide what later images must be like.
            options: of ``validate_data``, about the targets.

        Returns:
            Images (N, *image_shape_) of their own library, uint8 or floating point; and the
            targets on the host, None if there are none.
        """
        shape = tuple(getattr(x, "shape", ()))
        sample = shape[1:] if len(shape) > 2 else None
        home = library_of(x)
        if sample is not None:
            x = (np if home is None else home.xp).reshape(x, (shape[0], prod(sample)))
        targets = [on_host(each) for each in y]
        if home is None:
            more = {**options, "dtype": _DTYPES, "reset": reset}
            checked = validate_data(self, x, *targets, **more)
            x, t = checked if targets else (checked, None)
        else:
            self._check_on_device(home, x, reset)
            t = _check_y(targets[0], estimator=self, **options) if targets else None
            if t is not None and len(t) != x.shape[0]:
                raise LabelError(f"expected a target for each of {x.shape[0]} images, got {len(t)}")
        own = self._image_shape(sample) if reset else self.image_shape_
        if sample is not None and prod(sample) == prod(own) and not own[-len(sample) :] == sample:
            raise ShapeError(f"expected images (N, {str(own)[1:-1]}), got shape {shape}")
        self.image_shape_ = own
        return (np if home is None else home.xp).reshape(x, (x.shape[0], *own)), t

    def _check_on_device(self, home: Backend, x: Array, reset: bool) -> None:
        """Check an array (N, F) of another library than NumPy as ``validate_data`` does: one
        boolean is read from the device."""
        name, xp = type(self).__name__, home.xp
        if x.ndim != 2 or 0 in x.shape:
            raise ShapeError(
                f"{name} expects images (N, features) or (N, C, H, W), at least one; got shape "
                f"{tuple(x.shape)}"
            )
        if xp.isdtype(x.dtype, "complex floating"):
            raise ArrayError("Complex data not supported")
        if is_float(xp, x.dtype) and not bool(home.to_host(xp.all(xp.isfinite(x)))):
            raise ArgumentError("Input X contains NaN or infinity")
        if reset:
            self.n_features_in_ = int(x.shape[1])
            if hasattr(self, "feature_names_in_"):
                del self.feature_names_in_
        elif x.shape[1] != self.n_features_in_:
            raise ShapeError(
                f"X has {x.shape[1]} features, but {name} is expecting {self.n_features_in_} "
                "features as input"
            )

    def _image_shape(self, sample: Shape | None) -> Shape:
        """Return the shape (C, H, W) of the images that are fitted.

        Args:
            sample: shape of a sample that is not flat.
        """
        features = self.n_features_in_
        if self.image_shape is not None:
            shape = wholes("image_shape", self.image_shape, 1)
            if prod(shape) != features or len(shape) not in (2, 3):
                raise ShapeError(
                    f"image_shape={self.image_shape} has {prod(shape)} values, but the samples "
                    f"have {features}; image_shape is (C, H, W) or (H, W) of one sample"
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

    def _scaled(self, images: Array) -> Array:
        """Return images as the model takes them: uint8 if it was fitted on uint8, else floats."""
        xp = backend_of(images).xp
        if self.model_.preprocess is not None:
            if images.dtype == xp.uint8:
                return images
            return xp.astype(images, getattr(xp, self.dtype)) / 255
        if is_float(xp, images.dtype):
            return images
        return xp.astype(images, getattr(xp, self.dtype))

    def _outputs(self, X: Any) -> tuple[Array, Backend | None]:
        """Return the network's outputs (N, K) for images, on its device; and the backend that
        predictions are returned on, None for NumPy arrays."""
        check_is_fitted(self)
        images, _ = self._received(X, reset=False)
        return self.model_.predict(self._scaled(images)), library_of(X)

    def _returned(self, y: Array, home: Backend | None) -> Array:
        """Return predictions as arrays of the library that the images are of."""
        own = self.model_.home
        if home is None:
            return own.to_host(y)
        return y if home == own else home.asarray(own.to_host(y))

    def predict(self, X: Any) -> Array:
        raise NotImplementedError

    def _score(self, metric: Any, X: Any, y: Any, sample_weight: Any) -> float:
        predicted = on_host(self.predict(X))
        return float(metric(on_host(y), predicted, sample_weight=on_host(sample_weight)))

    # --- training ---------------------------------------------------------------------------------

    def _begin(self, images: Array, outputs: int) -> None:
        """Make the model for images, with new weights."""
        self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._calls = 0
        self._optimizer_state: dict[str, Any] | None = None
        home = library_of(images) if self.device is None else resolve(self.device)
        home, shape = resolve(None) if home is None else home, self.image_shape_
        where: dict[str, Any] = {"device": home, "dtype": self.dtype, "seed": self._seed}
        params = dict(self.model_params or {})
        if self.model == "small" or callable(self.model):
            make: Any = self.model if callable(self.model) else small_net
            model = make(shape, outputs, **params)
            if not isinstance(model, Model):
                raise ArgumentError(
                    f"model must return a portacnn.Model, got {type(model).__name__}"
                )
            model = model.to(home) if model.is_built() else model.build(shape, **where)
        else:
            model = make_model(self.model, shape, outputs, **params, **where)
        if model.output_shape != (outputs,):
            raise ShapeError(
                f"the model must have {outputs} outputs, but its output has shape "
                f"{model.output_shape}"
            )
        if str(images.dtype).endswith("uint8") and model.preprocess is None:
            model.preprocess = Normalize()
        self.model_ = model

    def _train(self, images: Array, targets: HostArray, weights: Any, once: bool) -> Self:
        """Train the model, for all epochs or for one of ``partial_fit``."""
        count, split = int(images.shape[0]), self.validation_split
        options: dict[str, Any] = {"augment": self.augment} if self.augment is not None else {}
        optimizer: Any = self.optimizer
        if once:
            optimizer = make_optimizer(self.optimizer, lr=self.lr)
            if self._optimizer_state is not None:
                optimizer.load_state_dict(self._optimizer_state, self.model_.named_parameters())
        else:
            options |= {
                "validation_split": split,
                "early_stopping": self.early_stopping,
                "lr": self.lr,
            }
            if split is not None:
                count -= round(fraction("validation_split", split) * count)
        if not self.verbose and (once or split is None):
            options["metrics"] = ()  # nobody reads them
        trainer = Trainer(
            self.model_,
            self._scaled(images),
            targets,
            **{
                **options,
                "loss": self.loss,
                "sample_weight": weights,
                "epochs": 1 if once else self.epochs,
                "batch_size": min(whole("batch_size", self.batch_size, 1), max(count, 1)),
                "optimizer": optimizer,
                "seed": self._seed + self._calls,
                "verbose": self.verbose,
                **(self.trainer_params or {}),
            },
        )
        trainer.train()
        self._calls += 1
        if once:
            self._optimizer_state = optimizer.state_dict()
        self.history_ = {name: list(figures) for name, figures in trainer.history.items()}
        self.n_iter_ = self._calls if once else trainer.epoch
        return self


class ConvNetClassifier(ClassifierMixin, _ConvNet):
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
        image_shape: (C, H, W) or (H, W) of a sample. See the head of this module for the default.
        epochs, batch_size, optimizer, lr, augment, validation_split, early_stopping, verbose: see
            ``portacnn.Trainer``. A batch holds at most all images. If none of ``validation_split``
            and ``verbose`` is set, accuracies are not computed after each epoch.
        trainer_params: more keyword arguments of ``Trainer``, such as {"schedule": "cosine"}.
        class_weight: factors in the loss: a mapping from classes, or "balanced".
        loss: a name or an object of ``portacnn.losses``, for one class of several.
        random_state: seed of weights, order and dropout; an int gives the same model each time.
        device: where the model is, see ``portacnn.resolve``. The default is the device of the
            images; for NumPy arrays, the variable ``PORTACNN_BACKEND``.
        dtype: of the model, "float32" or "float64".

    Attributes:
        classes_: the classes, sorted: a NumPy array.
        model_: the trained ``portacnn.Model``.
        image_shape_: (C, H, W) of the images.
        n_features_in_: C * H * W. ``feature_names_in_``: of a data frame with names.
        history_: ``Trainer.history`` of the last call of ``fit`` or ``partial_fit``.
        n_iter_: number of epochs of ``fit``, or number of calls of ``partial_fit``.
    """

    def __init__(
        self,
        model: str | MakeModel = "small",
        *,
        model_params: Mapping[str, Any] | None = None,
        image_shape: Sequence[int] | None = None,
        epochs: int = 20,
        batch_size: int = 32,
        optimizer: str = "adam",
        lr: float | None = None,
        augment: Any = None,
        validation_split: float | None = None,
        early_stopping: EarlyStopping | int | None = None,
        trainer_params: Mapping[str, Any] | None = None,
        class_weight: Mapping[Any, float] | Literal["balanced"] | None = None,
        loss: str | Loss = "cross_entropy",
        random_state: Any = None,
        device: str | Backend | None = None,
        dtype: str = "float32",
        verbose: bool = False,
    ) -> None:
        super().__init__(
            model,
            model_params,
            image_shape,
            epochs,
            batch_size,
            optimizer,
            lr,
            augment,
            validation_split,
            early_stopping,
            trainer_params,
            random_state,
            device,
            dtype,
            verbose,
        )
        self.class_weight = class_weight
        self.loss = loss

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train a new model on images with labels (N,), numbers or text. Returns self."""
        images, labels = self._received(X, y, reset=True)
        check_classification_targets(labels)
        self.classes_, targets = np.unique(labels, return_inverse=True)
        self._check_classes()
        self._begin(images, len(self.classes_))
        return self._train(images, targets, self._weights(labels, sample_weight), once=False)

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train for one epoch on these images, and return self.

        The first call needs ``classes``, all that will come. The optimizer's state is kept from
        one call to the next. After ``fit`` it begins anew, and training continues with the weights.
        """
        if isinstance(self.class_weight, str):
            raise ArgumentError(
                'class_weight="balanced" needs all labels at once; pass factors by class'
            )
        first = _check_partial_fit_first_call(self, None if classes is None else on_host(classes))
        try:
            images, labels = self._received(X, y, reset=first)
            check_classification_targets(labels)
            if len(unknown := np.setdiff1d(labels, self.classes_)):
                raise LabelError(f"unknown classes {unknown[:5].tolist()}; add them to `classes`")
            if first:
                self._check_classes()
                self._begin(images, len(self.classes_))
        except BaseException:
            if first:
                del self.classes_
            raise
        targets = np.searchsorted(self.classes_, labels)
        return self._train(images, targets, self._weights(labels, sample_weight), once=True)

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

    def _check_classes(self) -> None:
        if len(self.classes_) < 2:
            raise LabelError(f"expected at least two classes, got one class: {self.classes_[0]!r}")

    def _weights(self, labels: HostArray, sample_weight: Any) -> HostArray | None:
        """Return a factor for each image, from its own and its class's."""
        if sample_weight is None and self.class_weight is None:
            return None
        weights = _check_sample_weight(on_host(sample_weight), labels)
        return weights * compute_sample_weight(self.class_weight, labels)


class ConvNetRegressor(RegressorMixin, _ConvNet):
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

    def __init__(
        self,
        model: str | MakeModel = "small",
        *,
        model_params: Mapping[str, Any] | None = None,
        image_shape: Sequence[int] | None = None,
        epochs: int = 20,
        batch_size: int = 32,
        optimizer: str = "adam",
        lr: float | None = None,
        augment: Any = None,
        validation_split: float | None = None,
        early_stopping: EarlyStopping | int | None = None,
        trainer_params: Mapping[str, Any] | None = None,
        loss: str | Loss = "mse",
        random_state: Any = None,
        device: str | Backend | None = None,
        dtype: str = "float32",
        verbose: bool = False,
    ) -> None:
        super().__init__(
            model,
            model_params,
            image_shape,
            epochs,
            batch_size,
            optimizer,
            lr,
            augment,
            validation_split,
            early_stopping,
            trainer_params,
            random_state,
            device,
            dtype,
            verbose,
        )
        self.loss = loss

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
        images, targets = self._received(X, y, reset=first, multi_output=True, y_numeric=True)
        shape = targets.shape[1:]
        if first:
            self._target_shape = shape
            self._begin(images, prod(shape))
        elif shape != self._target_shape:
            raise LabelError(f"expected targets (N, {str(self._target_shape)[1:]}, got {shape}")
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(on_host(sample_weight), targets)
        return self._train(images, targets, weights, once)

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
