"""``Model``: a network that classifies. A ``Sequential`` that takes arrays of any library, and is
saved to files."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any, Self, TypeVar

from portacnn import losses, ops
from portacnn.arguments import answering_keywords, whole
from portacnn.data.labels import class_indices
from portacnn.data.rows import Rows, form
from portacnn.data.targets import on_host, sample_weights
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    ModelFormatError,
    NotFiniteError,
    ShapeError,
    StateError,
)
from portacnn.files import load_tensors, save_tensors, within
from portacnn.gradient_check import numerical_gradient
from portacnn.layers import Layer, Sequential, gradients_of
from portacnn.layers.base import Shape
from portacnn.layers.passes import output_of, without_dx
from portacnn.layers.running import run
from portacnn.layers.state import Mismatch, outline
from portacnn.losses import Loss
from portacnn.metrics import Metric, metrics_for
from portacnn.models.evaluation import evaluate
from portacnn.models.files import describe_model, rebuild_model
from portacnn.models.inference import Inference
from portacnn.models.info import ModelInfo, layout_of
from portacnn.models.inputs import Pixels, check_fits, image_count, reshaping
from portacnn.models.preprocess import Normalize
from portacnn.models.sizes import Sizes
from portacnn.models.summary import html_table, table
from portacnn.ops.dispatch import not_complex
from portacnn.runtime import (
    Array,
    Backend,
    HostArray,
    backend_of,
    cast,
    describe,
    is_float,
    resolve,
)
from portacnn.version import VERSION

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _at_home(method: _Method) -> _Method:
    """Run the method within ``Backend.active``."""

    @wraps(method)
    def run(self: "Model", *args: Any, **kwargs: Any) -> Any:
        if self.backend is None or not self.backend.enters:
            return method(self, *args, **kwargs)
        with self.backend.active():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class Model(Sequential):
    """A ``Sequential`` whose output is one logit per class.

        >>> from portacnn.layers import Conv2d, Flatten, Linear, ReLU
        >>> layers = {"conv1": Conv2d(1, 8, 3), "relu1": ReLU(), "flatten": Flatten()}
        >>> model = Model(**layers, fc1=Linear(None, 10))
        >>> model = model.build((1, 28, 28), device="cpu", seed=0)
        >>> import numpy as np
        >>> model.predict(np.zeros((2, 1, 28, 28), "float32")).shape
        (2, 10)

    Images (N, *input_shape) are NumPy arrays, or arrays on the model's device of any library that
    supports DLPack (``__dlpack__``: CuPy, torch, JAX, ...), whose memory is then shared. Labels are
    integers (N,) or one-hot (N, classes). Images of uint8 require a ``preprocess`` such as
    ``Normalize()``. It is not applied to floating-point images.

    A fully convolutional network also takes images of another size, if every layer accepts it with
    the parameters that it has.
    """

    takes_children = True

    def __init__(self, *layers: Layer, **named: Layer) -> None:
        super().__init__(*layers, **named)
        self._inference = Inference()
        self._sizes = Sizes()
        self._pixels = Pixels()

    _preprocess: Normalize | None = None
    _info = ModelInfo()

    @property
    def preprocess(self) -> Normalize | None:
        """Maps uint8 images to the network's input; None (the default) does not accept them. It is
        saved with the model.

        Setting it raises:
            ArgumentError: if it is not a ``Normalize``.
            ShapeError: if it is for another number of channels.
        """
        return self._preprocess

    @preprocess.setter
    def preprocess(self, value: Normalize | None) -> None:
        if value is not None and not isinstance(value, Normalize):
            raise ArgumentError(
                f"preprocess must be a portacnn.Normalize or None, got {value!r}", self.where
            )
        if value is not None and self.input_shape:
            check_fits(value, self.input_shape, self.where)
        self._preprocess = value

    @property
    def info(self) -> ModelInfo:
        """Information about the model: class names, task, figures of its training run, and the form
        of its input. It is saved with the model, and in ONNX files.

            model.info = portacnn.models.ModelInfo(class_names=["cat", "dog"])

        A ``Trainer`` sets task and figures. Class names are forgotten if ``replace`` changes their
        number. Input and preprocess are the model's own, whatever is set here.

        Setting it raises:
            ArgumentError: if it is not a ``ModelInfo``, or has another number of names than the
                model has outputs.
        """
        own, names = self._info, self._info.class_names
        return replace(
            own,
            class_names=names if len(names) in (0, *self.output_shape[:1]) else (),
            input_shape=self.input_shape,
            layout=layout_of(self.input_shape),
            dtype=self.dtype,
            preprocess=self._preprocess,
            version=own.version or VERSION,
        )

    @info.setter
    def info(self, value: ModelInfo) -> None:
        if not isinstance(value, ModelInfo):
            raise ArgumentError(
                f"info must be a portacnn.models.ModelInfo, got {value!r:.80}", self.where
            )
        names, outputs = value.class_names, self.output_shape[:1]
        if names and outputs and (len(names),) != outputs:
            raise ArgumentError(
                f"class_names must have a name for each of the {outputs[0]} outputs, got "
                f"{len(names)}",
                self.where,
            )
        self._info = value

    def check_scale(self, check: bool) -> None:
        """Check the scale of the next floating-point images on a device, or of none there until
        this is called again. A ``Trainer`` does without while it trains: the images that it
        evaluates are its own."""
        self._pixels.check_next_on_a_device(check)

    def infer(self, shape: Shape) -> Shape:
        if self._preprocess is not None:
            check_fits(self._preprocess, shape, self.where)
        try:
            return super().infer(shape)
        except ShapeError as error:
            if len(shape) == 3 and shape[0] > 4 >= shape[2]:
                error.message += (
                    f". Shapes are (C, H, W): did you mean {(shape[2], *shape[:2])} "
                    f"instead of {shape}?"
                )
            raise

    @_at_home
    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        return super().forward(x, train=train, keep=keep)

    # ``forward`` is that of Sequential, so these remain valid.
    prepare, joined = Sequential.prepare, Sequential.joined
    prepare_joined = Sequential.prepare_joined

    @_at_home
    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return super().backward(dy, cache, need_dx=need_dx)

    @_at_home
    def accept(self, x: Array) -> Array:
        """Return images as the model keeps them: on its device, sharing memory if they are there
        already.

        Floating-point images take the model's dtype. uint8 images stay uint8 until ``batch``.

        Raises:
            ArrayError: if x is uint8 without a ``preprocess``, another integer dtype, on another
                device (NumPy arrays are always accepted), or of a library without DLPack.
            ShapeError: if x is not (N, *input_shape), nor of another size that all layers accept.
            NotFiniteError: if values are beyond the range of the model's dtype.
        """
        x = self.received(x)
        if isinstance(x, Rows):
            x = x[:]
        self._look_at_scale(x)
        return self._kept(x)

    def _look_at_scale(self, x: Array) -> None:
        if self.kept_as(x) != "uint8":
            self._pixels.look_at_floats(x, self, self._info.input_range)

    def _kept(self, x: Array) -> Array:
        """Return images from ``received`` as ``accept`` does, without a look at their scale."""
        home, x = self.home, self.cast(x)
        return x if backend_of(x).name == home.name else home.share(x)

    def cast(self, x: Array) -> Array:
        """Return images from ``received`` in the dtype that they are kept in. Raises as ``accept``
        does."""
        dtype = self.kept_as(x)
        try:
            return cast(x, backend_of(x).dtype(dtype))
        except NotFiniteError as error:
            error.message = (
                f"images {error.message}: scale them, or build the model with dtype='float64'"
            )
            raise error.at(self.where)

    def received(self, x: Any, what: str = "x") -> Array:
        """Return an array of any library as one of the model's own on its device, sharing memory.

        NumPy arrays, and images that are read batch by batch (``portacnn.data.Rows``), are
        returned as they are.

        Args:
            what: the argument's name, for the message.

        Raises:
            ArrayError: as for ``accept``.
        """
        if isinstance(x, Rows):
            return x
        try:
            return self.home.receive(x)
        except ArrayError as error:
            if not hasattr(x, "shape") and not hasattr(x, "__dlpack__"):  # not an array
                error.message = f"{what}: {error.message}"
            raise error.at(self.where)

    def kept_as(self, x: Array) -> str:
        """Return the dtype that ``accept`` returns for these images, "uint8" or the model's own.

        Args:
            x: as ``received`` returns it.

        Raises:
            ArrayError, ShapeError: as for ``accept``.
        """
        x = form(x)
        if tuple(x.shape[1:]) != self.input_shape or x.ndim < 1:
            reason = self._sizes.of(x, self).reason
            if reason is not None:
                raise ShapeError(
                    f"expected images (N, {', '.join(map(str, self.input_shape))}), got "
                    f"{describe(x)}{reason or reshaping(x, self.input_shape)}",
                    self.where,
                )
        return self._dtype_of(x)

    def _dtype_of(self, x: Array) -> str:
        """Return the dtype that images like x are kept in."""
        if is_float(backend_of(x).xp, x.dtype):
            return self.dtype
        if backend_of(x).xp.isdtype(x.dtype, "complex floating"):
            raise not_complex(x, self.where, "images")
        if self._preprocess is None:
            raise ArrayError(
                f"expected floating-point images, got {describe(x)}; scale them first: "
                "x.astype('float32') / 255, or load_mnist(normalize=True). Or let the model "
                "scale uint8 images: model.preprocess = portacnn.Normalize()",
                self.where,
            )
        if x.dtype != backend_of(x).xp.uint8:
            raise ArrayError(
                f"expected images of uint8 or floating point, got {describe(x)}; convert them "
                "first: x.astype('uint8') if they are whole numbers 0..255",
                self.where,
            )
        return "uint8"

    @_at_home
    def batch(self, images: Array, chosen: Array | None = None) -> Array:
        """Return a batch for ``forward``: images from ``accept``, preprocessed, in the backend's
        preferred layout.

        Args:
            chosen: indices of the images in order, int64 (B,) on the model's device. None takes
                all.
        """
        if self._dtype_of(images) != "uint8":
            return ops.take_batch(images, chosen)
        return ops.take_batch(images, chosen, *self._pixels.mean_and_std(self))

    def _batch(self, x: Array) -> Array:
        return self.batch(self.accept(x))

    def _batch_of_kept(self, x: Array) -> Array:
        return self.batch(self._kept(x))

    @_at_home
    def labels(self, t: Array, count: int, what: str = "labels") -> Array:
        """Return labels, checked on the host, as int64 (count,) on the model's device.

        They may be of any library that has a backend, on any device, or of one that supports
        DLPack.

        Args:
            t: integers (N,) or one-hot (N, classes).
            count: N, the number of images.
            what: the argument's name, for the message.

        Raises:
            LabelError, ArrayError: if they do not fit the images or the network.
        """
        host = on_host(self.received_targets(t, what))
        return self.home.asarray(class_indices(host, count, self.classes, what))

    def received_targets(self, t: Array, what: str = "targets") -> Array:
        """Return lists, and targets of a library that has a backend, as they are, and others as
        ``received`` does. Raises ArrayError."""
        if not hasattr(t, "shape") and not hasattr(t, "__dlpack__"):
            return t
        try:
            backend_of(t)
        except ArrayError:
            return self.received(t, what)
        return t

    @property
    def classes(self) -> int:
        """The number of outputs. Raises ShapeError if a sample's output has several axes."""
        if len(self.output_shape) != 1:
            raise ShapeError(
                "expected a network with one output for each class, but its output has shape "
                f"{self.output_shape}"
            )
        return self.output_shape[0]

    @_at_home
    def predict(self, x: Array, batch_size: int | None = None) -> Array:
        """Return the logits (N, classes) of images x, on the model's device.

        Softmax is not applied: the largest logit is the most likely class. If the last batch is a
        single image and batch norm without running statistics has no variance over it, it is joined
        to the batch before.

        Args:
            x: images (N, *input_shape), see ``accept``.
            batch_size: images per forward pass. The default keeps the arrays that are in use at
                one time within 512 MiB, and is at most 256.

        Raises:
            ArrayError, ShapeError, NotFiniteError: as for ``accept``.
            ArgumentError: if batch_size is below 1.
        """
        parts = [y for _, _, y in self.outputs(x, batch_size)]
        y = parts[0] if len(parts) == 1 else self.home.xp.concat(parts, axis=0)
        return self.home.returned(y, x)

    def outputs(self, x: Array, batch_size: int | None = None) -> Iterator[tuple[int, int, Array]]:
        """Yield the outputs of ``predict`` batch by batch: first, last (exclusive) and y.

        Use it if the outputs of all images would take too much memory. Raises as ``predict`` does.
        """
        if batch_size is not None:
            try:
                batch_size = whole("batch_size", batch_size, 1)
            except ArgumentError as error:
                raise error.at(self.where)
        x = self.received(x)
        self.check_built()
        size = self._sizes.of(x, self)
        batch = self._batch
        if not isinstance(x, Rows):
            # here and not by batch, as a prepared path does not ask for a batch of each image
            self._look_at_scale(x)
            batch = self._batch_of_kept
        hold = min(batch_size or size.most, image_count(x)) <= size.most
        for i, j, images in size.batches(x, batch_size):
            yield i, j, self._inference.run(self, images, batch, hold)

    @_at_home
    def features(self, x: Array, path: str, batch_size: int | None = None) -> Array:
        """Return the output of a layer of this model for images x, (N, *output_shape of the layer),
        on the model's device: embeddings of images, for search or another classifier.

        Layers after it do not run. A batch's values may differ in the last bits from those within
        ``predict``, which runs several layers as one.

            >>> import numpy as np, portacnn
            >>> net = portacnn.SimpleConvNet((1, 8, 8), {"filter_size": 3}, device="cpu", seed=0)
            >>> net.features(np.zeros((2, 1, 8, 8), "float32"), "fc1").shape
            (2, 100)

        Args:
            x, batch_size: see ``predict``.
            path: of the layer, as in ``summary``: "layer4", "layer1.0.conv1". Of a layer in several
                places it may be any of their paths.

        Raises:
            ArgumentError: there is no layer at this path, or as for ``predict``.
            StateError: the layer is part of another layer, which does not run it separately.
        """
        if batch_size is not None:
            try:
                batch_size = whole("batch_size", batch_size, 1)
            except ArgumentError as error:
                raise error.at(self.where)
        given, x = x, self.received(x)
        layer = self.layer_at(path)
        paths = [place.path for place in layer.places]
        place = paths.index(path) if path in paths else 0
        self.check_built()
        parts = []
        for _, _, images in self._sizes.of(x, self).batches(x, batch_size):
            y = output_of(self, layer, place, self._batch(images))
            if y is None:
                raise StateError(
                    "its output cannot be seen: the layer around it does not run it as a layer",
                    layer.where,
                )
            parts.append(y)
        y = parts[0] if len(parts) == 1 else self.home.xp.concat(parts, axis=0)
        return self.home.returned(y, given)

    def train_in_memory(self, function: Callable[..., Any], /, *arguments: Any) -> Any:
        """Return ``function(*arguments)``, a part of a training step of this model, in the memory
        that ``predict`` uses too. What it returns must have memory of its own.
        """
        return self._inference.train(function, *arguments)

    def release_memory(self) -> None:
        """Release the memory that ``predict``, ``loss``, ``accuracy`` and training steps keep for
        their next call.

        They keep about as much as their largest call needed until the model is deleted. Results and
        parameters are not affected. The next call allocates memory again.
        """
        self._inference.release()

    @_at_home
    def loss(self, x: Array, t: Array, loss: str | Loss = "cross_entropy") -> float:
        """Return the mean loss of images x with targets t, as a float.

        Images run in batches, as in ``predict``; the mean is over all of them.

        Args:
            x: images (N, *input_shape). ``t``: targets that the loss takes.
            loss: a word or an object of ``portacnn.losses``.
        """
        return float(self.evaluate(x, t, loss=loss, metrics=())["loss"])

    @_at_home
    def evaluate(
        self,
        x: Array,
        t: Array,
        *,
        loss: str | Loss = "cross_entropy",
        metrics: Iterable[str | Metric] | Mapping[str, str | Metric] | None = None,
        sample_weight: Array | None = None,
        batch_size: int | None = None,
    ) -> dict[str, Any]:
        """Return the mean loss and metrics of images x with targets t, by name.

        One batch's outputs are in memory at a time, so any number of images will do.

        Args:
            x: images (N, *input_shape). ``t``: targets that the loss takes.
            loss: a word or an object of ``portacnn.losses``.
            metrics: words or objects of ``portacnn.metrics``; the default is the loss's own.
            sample_weight: (N,) a factor for each image in the loss, or None.
            batch_size: see ``predict``.

        Raises:
            LabelError: if the targets do not fit the loss or the outputs.
            ArgumentError: if there are no images, or a metric does not fit the loss.
        """
        home, loss, x = self.home, losses.named(loss), self._to_evaluate(x, "evaluation")
        count = x.shape[0]
        t = self.received_targets(t)
        size, shape = tuple(x.shape[1:]), self.output_shape
        if size != self.input_shape:
            shape = outline(self).plan(size)
        checked = loss.check_targets(t, shape, count=count, dtype=self.dtype)
        weights = None
        if sample_weight is not None:
            weights = home.asarray(sample_weights(sample_weight, count, dtype=self.dtype))
        chosen = metrics_for(loss, metrics)
        batches = self.outputs(x, batch_size)
        return evaluate(home, batches, home.asarray(checked), loss, chosen, weights, self.dtype)

    def _to_evaluate(self, x: Array, what: str) -> Array:
        """Return images as ``received`` does, checked. Raises ArgumentError if there are none."""
        x = self.received(x)
        if image_count(x) == 0:
            raise ArgumentError(f"{what} needs at least one image, got none", self.where)
        self.kept_as(x)
        return x

    def accuracy(self, x: Array, t: Array, batch_size: int | None = None) -> float:
        """Return the share of images x that are classified as their label in t, 0 to 1.

        The class is the largest logit. An image with NaN among its logits counts as wrong.

        Args:
            x: images (N, *input_shape). ``t``: labels (N,) or one-hot (N, classes).
            batch_size: see ``predict``.

        Raises:
            ArgumentError: if there are no images.
        """
        x = self._to_evaluate(x, "accuracy")
        return self.count_correct(x, self.labels(t, x.shape[0]), batch_size) / x.shape[0]

    @_at_home
    def count_correct(self, x: Array, t: Array, batch_size: int | None = None) -> int:
        """Return how many images x are classified as t, labels from ``labels``. NaN is never
        correct."""
        count: Any = 0
        for i, j, y in self.outputs(x, batch_size):
            # outputs that are kept keep malloc from reusing the memory between them
            count = self.home.xp.count_nonzero(ops.is_correct(y, t[i:j, ...])) + count
        return int(self.home.to_host(count))

    @_at_home
    def gradient(self, x: Array, t: Array) -> dict[str, Array]:
        """Return the gradient of ``loss`` for every parameter, from a backward pass: new arrays, by
        path."""
        x = self.received(x)
        self.kept_as(x)
        labels = self.labels(t, x.shape[0])
        with without_dx(self):
            logits, kept = run(self, self._batch(x), False, True)
        _, cache = ops.softmax_cross_entropy(logits, labels)
        with gradients_of(self) as gradients:
            self.backward(ops.softmax_cross_entropy_backward(1.0, cache), kept, need_dx=False)
        return gradients

    @_at_home
    def numerical_gradient(self, x: Array, t: Array, h: float = 1e-4) -> dict[str, Array]:
        """Return the gradient of ``loss`` by finite differences, by path.

        It takes two forward passes per element of each parameter: use it for small networks, in
        float64.
        """
        return {
            path: numerical_gradient(lambda: self.loss(x, t), array, h)
            for path, array in self.named_parameters().items()
        }

    # --- description ------------------------------------------------------------------------------

    def summary(self, input_shape: Sequence[int] | None = None, batch_size: int = 1) -> str:
        """Return a table of the layers: path, class, output shape, parameters, multiply-adds and
        activation memory.

        Nothing is allocated and the network does not change, so the network need not be built, and
        ``input_shape`` may differ from the one it was built for. Multiply-adds are those of one
        sample's forward pass, in convolutions and linear maps. The memory is that of each layer's
        output for a batch, counted as if no output were a view.

        Args:
            input_shape: (C, H, W) of one sample; by default the one it was built for.
            batch_size: number of samples for the memory.

        Raises:
            StateError: if it is not built and there is no ``input_shape``.
            ShapeError: if the network does not take such samples.
        """
        if input_shape is None:
            self.check_built()
            input_shape = self.input_shape
        return table(self, input_shape, whole("batch_size", batch_size, 1))

    def _repr_html_(self) -> str | None:
        """Return ``summary`` as a table for a notebook; None (its text) if it is not built."""
        return html_table(self, self.input_shape) if self.is_built() else None

    # --- files ------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write architecture, weights and ``preprocess`` as one safetensors file, atomically.

        Raises:
            ArgumentError: if JSON cannot hold an argument of a layer (a function as
                ``weight_init``).
            OSError: if the file cannot be written.
        """
        save_tensors(path, self.state_dict(), self.description())

    def description(self) -> dict[str, Any]:
        """Return architecture, input and ``preprocess`` as JSON values; ``rebuild`` reads them.

        Raises:
            ArgumentError: as for ``save``.
        """
        return describe_model(self)

    def description_of_info(self) -> dict[str, Any]:
        """Return ``info`` as JSON values, with this version of portacnn."""
        return replace(self.info, version=VERSION).description()

    def load_weights(self, path: str | os.PathLike[str], strict: bool = True) -> Mismatch:
        """Load the weights of a safetensors file, also one from PyTorch for the same network.

        See ``load_state_dict``.

        Raises:
            ModelFormatError: if it is not an intact safetensors file, or does not fit. Nothing has
                changed then.
        """
        tensors, _ = load_tensors(path)
        try:
            return self.load_state_dict(tensors, strict)
        except ModelFormatError as error:
            raise ModelFormatError(str(error), str(path)) from None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | Backend | None = None) -> Self:
        """Return the model that ``save`` wrote, with its weights and its ``preprocess``, on
        ``device``.

        A ``Trainer``'s checkpoint contains the model as it was then.

        Raises:
            ModelFormatError: if the file is damaged, not portacnn's, or holds another class than
                this one.
        """
        backend = resolve(device)
        tensors, header = load_tensors(path)
        if isinstance(header, dict) and "checkpoint" in header:
            tensors, header = within("model", tensors), header.get("model")
        return cls.rebuild(tensors, header, backend, str(path))

    @classmethod
    def rebuild(
        cls,
        tensors: dict[str, HostArray],
        header: Any,
        backend: Backend,
        where: str,
        seed: Any = None,
    ) -> Self:
        """Return the model that ``header`` describes, with these weights.

        Args:
            tensors: weights and buffers by path.
            header: from ``description``.
            where: the file's name, for messages.
            seed: seed of what the model draws during training.

        Raises:
            ModelFormatError: as for ``load``.
        """
        model: Self = rebuild_model(cls, tensors, header, backend, where, seed)
        return model


@answering_keywords("load")
def load(path: str | os.PathLike[str], *, device: str | Backend | None = None) -> Model:
    """Return the model that ``Model.save`` wrote, of whatever class. See ``Model.load``.

    >>> import portacnn, tempfile, os
    >>> model = portacnn.SimpleConvNet((1, 8, 8), {"filter_size": 3}, device="cpu", seed=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.save(os.path.join(folder, "net.safetensors"))
    ...     again = portacnn.load(os.path.join(folder, "net.safetensors"), device="cpu")
    >>> type(again).__name__
    'SimpleConvNet'
    """
    return Model.load(path, device=device)
