"""``ConvNet``, what both estimators share: parameters, the network, and its training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Self

from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from portacnn.arguments import fraction, whole
from portacnn.errors import ArgumentError, ShapeError
from portacnn.layers import Layer
from portacnn.layers.base import Shape
from portacnn.losses import Loss
from portacnn.models import Model, Normalize, make_model
from portacnn.optim import make_optimizer
from portacnn.runtime import Array, Backend, HostArray, backend_of, is_float, resolve
from portacnn.sklearn.images import library_of, on_host, received
from portacnn.sklearn.networks import small_net
from portacnn.training import EarlyStopping, Trainer

MakeModel = Callable[[Shape, int], Layer]


@dataclass(repr=False, eq=False)
class ConvNet(BaseEstimator):
    """The base class of both estimators.

    A dataclass: its ``__init__`` has the signature and does the assignments, and nothing else, that
    scikit-learn expects. See ``ConvNetClassifier`` for the parameters.
    """

    model: str | MakeModel = "small"
    _: KW_ONLY
    model_params: Mapping[str, Any] | None = None
    image_shape: Sequence[int] | None = None
    epochs: int = 20
    batch_size: int = 32
    optimizer: str = "adam"
    lr: float | None = None
    augment: Any = None
    validation_split: float | None = None
    early_stopping: EarlyStopping | int | None = None
    trainer_params: Mapping[str, Any] | None = None
    loss: str | Loss = "cross_entropy"
    random_state: Any = None
    device: str | Backend | None = None
    dtype: str = "float32"
    verbose: bool = False
    model_: Model = field(init=False)
    image_shape_: Shape = field(init=False)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        tags.input_tags.three_d_array = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "model_")

    # --- predictions ------------------------------------------------------------------------------

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
        images, _ = received(self, X, reset=False)
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
