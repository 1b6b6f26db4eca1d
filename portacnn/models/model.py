"""``Model``: a network that classifies. A ``Sequential`` that takes arrays of any library, and is
saved to files."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
from math import prod
from typing import Any, NamedTuple, Self, TypeVar

from portacnn import losses, ops
from portacnn.arguments import answering_keywords, whole
from portacnn.data.labels import class_indices
from portacnn.data.targets import on_host, sample_weights
from portacnn.errors import (
    ArgumentError,
    ArrayError,
    ModelFormatError,
    NotFiniteError,
    PortacnnError,
    ShapeError,
    StateError,
)
from portacnn.files import load_tensors, save_tensors, within
from portacnn.gradient_check import numerical_gradient
from portacnn.layers import Flatten, Layer, Reshape, Sequential, gradients_of
from portacnn.layers.base import Shape
from portacnn.layers.building import building_from
from portacnn.layers.freezing import frozen_paths, restore
from portacnn.layers.limits import limited
from portacnn.layers.passes import output_of, without_dx
from portacnn.layers.running import run
from portacnn.layers.state import Mismatch, outline
from portacnn.losses import Loss
from portacnn.metrics import Metric, metrics_for
from portacnn.models.description import Described, describe_layer, needs_format_2, rebuild_layer
from portacnn.models.evaluation import evaluate
from portacnn.models.inference import Inference
from portacnn.models.info import ModelInfo, layout_of, rebuild_info
from portacnn.models.preprocess import Normalize, rebuild_preprocess
from portacnn.models.summary import table
from portacnn.ops.windows import per_axis
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
from portacnn.text import shown
from portacnn.version import VERSION

_log = logging.getLogger("portacnn")
_MAX_BYTES = 512 << 20  # bytes for the layers' outputs in ``predict``
# layers that a class may create from its arguments, besides those with tensors in the file
_MOST_LAYERS = 4096
_MOST = 256  # images at a time in ``predict``
_MOST_SIZES = 64  # of images that a model remembers
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


class _Size(NamedTuple):
    """Images of one size.

    Attributes:
        most, least: how many of them go through at a time in ``predict``.
        reason: None if the model takes them; else why not, for a message.
    """

    most: int
    least: int
    reason: str | None = None

    @classmethod
    def of(cls, planned: Layer) -> Self:
        """For the size that a network is planned for."""
        numbers = sum(
            prod(place.output_shape)
            for layer in planned.walk()
            if not layer.children
            for place in layer.places
        )
        least = max(layer.least_predicted for layer in planned.walk())
        return cls(max(least, min(_MOST, _MAX_BYTES // (8 * max(numbers, 1)))), least)


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
        self._sizes: dict[tuple[int, Shape], _Size] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: {} if name == "_sizes" else value
            for name, value in super().__getstate__().items()
            if name != "_constants"
        }

    _preprocess: Normalize | None = None
    _info = ModelInfo()
    # whether floating-point images on a device were checked
    _floats_seen = False
    _warned = False  # that floating-point images look like bytes
    # key of the cache; mean; std
    _constants: tuple[tuple[Any, ...], Array | None, Array] | None = None

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
            _fits(value, self.input_shape, self.where)
        self._preprocess = value

    @property
    def info(self) -> ModelInfo:
        """What the model knows about itself: names of its classes, task, figures of its training,
        and what its input must be. It is saved with the model, and in ONNX files.

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

    def infer(self, shape: Shape) -> Shape:
        if self._preprocess is not None:
            _fits(self._preprocess, shape, self.where)
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
        home, x = self.home, self.received(x)
        if self.kept_as(x) != "uint8":
            self._look_at_floats(x)
        x = self.cast(x)
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

    def _look_at_floats(self, x: Array) -> None:
        """Warn once if floating-point images are on another scale than the model's: pixels 0..255
        for one that was trained on 0..1, or the other way, or pixels that ``preprocess`` would have
        scaled if they were uint8.

        NumPy images are checked in each call; those on a device only the first time, because
        reading waits there.
        """
        source, known = backend_of(x), self._info.input_range
        if not known and self._preprocess is None:
            return
        if self._warned or 0 in x.shape or (self._floats_seen and source.name != "numpy"):
            return
        self._floats_seen = True
        some = source.xp.abs(x[: min(16, x.shape[0]), ...])
        largest = float(source.to_host(source.xp.max(some)))
        usual = max(map(abs, known)) if known else self._largest_of_bytes()
        if self._preprocess is not None and largest > 8 * max(usual, self._largest_of_bytes()):
            self._warned = True
            _log.warning(
                "%s: preprocess does not apply to floating-point images, but these reach %g, "
                "while it maps a byte to at most %g. If they are pixels 0..255, pass them as "
                "uint8: x.astype('uint8')",
                self.where,
                largest,
                self._largest_of_bytes(),
            )
        elif known and (largest > 8 * max(usual, 1.0) or largest <= 1.0 < 100.0 <= usual):
            self._warned = largest > 0.0  # an image may be black
            if self._warned:
                up = largest > usual
                _log.warning(
                    "%s: the model was trained on images of %.3g..%.3g, these go to %.3g. If they "
                    "are %s: %s",
                    self.where,
                    *known,
                    largest,
                    "pixels 0..255, scale them as in training" if up else "shares 0..1",
                    "x / 255" if up else "x * 255",
                )

    def _largest_of_bytes(self) -> float:
        """Return the largest magnitude that ``preprocess`` maps a byte to."""
        means, stds = self._preprocess.in_pixels(self.input_shape[0])  # type: ignore[union-attr]
        return max(
            abs(pixel - mean) / std
            for pixel in (0, 255)
            for mean, std in zip(means, stds, strict=True)
        )

    def received(self, x: Any, what: str = "x") -> Array:
        """Return an array of any library as one of the model's own on its device, sharing memory.

        NumPy arrays are returned as they are.

        Args:
            what: the argument's name, for the message.

        Raises:
            ArrayError: as for ``accept``.
        """
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
        if tuple(x.shape[1:]) != self.input_shape or x.ndim < 1:
            reason = self._size_of(x).reason
            if reason is not None:
                raise ShapeError(
                    f"expected images (N, {', '.join(map(str, self.input_shape))}), got "
                    f"{describe(x)}{reason or _reshaping(x, self.input_shape)}",
                    self.where,
                )
        return self._dtype_of(x)

    def _size_of(self, x: Array) -> "_Size":
        """What there is to know about images of this size: the built one, or another that all
        layers take with the parameters that they have."""
        shape = tuple(x.shape[1:])
        if shape == self.input_shape:
            return self._known_size(shape, lambda: _Size.of(self))
        if x.ndim != len(self.input_shape) + 1 or shape[:1] != self.input_shape[:1]:
            return _Size(_MOST, 1, "")
        return self._known_size(shape, lambda: self._other_size(shape))

    def _known_size(self, shape: Shape, found: Callable[[], "_Size"]) -> "_Size":
        key = self.revision, shape
        size = self._sizes.get(key)
        if size is None:
            size = found()
            if len(self._sizes) >= _MOST_SIZES:
                self._sizes = {}
            self._sizes[key] = size
        return size

    def _other_size(self, shape: Shape) -> "_Size":
        for layer in self.walk():
            if isinstance(layer, Flatten | Reshape) and any(
                prod(place.input_shape[1:]) > 1 for place in layer.places
            ):
                return _Size(_MOST, 1, f"; {layer.where} binds the network to this size")
        twin = outline(self)
        try:
            twin.plan(shape)
        except PortacnnError as error:
            return _Size(_MOST, 1, f"; another size does not fit: {error}")
        for ours, theirs in zip(self.walk(), twin.walk(), strict=True):
            for has, needs in (
                (ours.declared, theirs.declared),
                (ours.declared_buffers, theirs.declared_buffers),
            ):
                for name, spec in needs.items():
                    if name not in has or has[name].shape != spec.shape:
                        return _Size(
                            _MOST,
                            1,
                            f"; for images {shape}, {ours.full_name(name)} would have to be "
                            f"{spec.shape}",
                        )
        return _Size.of(twin)

    def _dtype_of(self, x: Array) -> str:
        """Return the dtype that images like x are kept in."""
        if is_float(backend_of(x).xp, x.dtype):
            return self.dtype
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
        return ops.take_batch(images, chosen, *self._mean_and_std())

    def _mean_and_std(self) -> tuple[Array | None, Array]:
        """Return mean and std of ``preprocess`` on the device, in units of the pixels. They are
        cached."""
        made_for = (self._preprocess, self.backend, self.dtype, self.input_shape)
        if self._constants is None or self._constants[0] != made_for:
            home, (channels, *size) = self.home, self.input_shape
            mean, std = (
                home.xp.reshape(home.asarray(values, self.dtype), (channels, *(1 for _ in size)))
                if any(values)
                else None
                for values in self._preprocess.in_pixels(channels)  # type: ignore[union-attr]
            )
            self._constants = made_for, mean, std
        return self._constants[1:]

    def _batch(self, x: Array) -> Array:
        return self.batch(self.accept(x))

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
            batch_size: images per forward pass. The default keeps the layers' outputs within 512
                MiB, and is at most 256.

        Raises:
            ArrayError, ShapeError, NotFiniteError: as for ``accept``.
            ArgumentError: if batch_size is below 1.
        """
        parts = [y for _, _, y in self.outputs(x, batch_size)]
        return parts[0] if len(parts) == 1 else self.home.xp.concat(parts, axis=0)

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
        most = self._size_of(x).most
        hold = min(batch_size or most, _count(x)) <= most
        for i, j, images in self._in_batches(x, batch_size):
            yield i, j, self._inference.run(self, images, self._batch, hold)

    def _in_batches(self, x: Array, batch_size: int | None) -> Iterator[tuple[int, int, Array]]:
        """Yield the batches of ``predict``: first, last (exclusive) and images. At least one."""
        most, least, _ = self._size_of(x)
        count, size = _count(x), batch_size or most
        ends = [*range(size, count, size), count]
        if len(ends) > 1 and size >= least > count - ends[-2]:
            del ends[-2]
        for i, j in zip((0, *ends[:-1]), ends, strict=True):
            yield i, j, x if j - i == count else x[i:j, ...]

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
            StateError: the network does not run the layer as a layer of its own.
        """
        if batch_size is not None:
            try:
                batch_size = whole("batch_size", batch_size, 1)
            except ArgumentError as error:
                raise error.at(self.where)
        x = self.received(x)
        layer = self.layer_at(path)
        paths = [place.path for place in layer.places]
        place = paths.index(path) if path in paths else 0
        self.check_built()
        parts = []
        for _, _, images in self._in_batches(x, batch_size):
            y = output_of(self, layer, place, self._batch(images))
            if y is None:
                raise StateError(
                    "its output cannot be seen: the layer around it does not run it as a layer",
                    layer.where,
                )
            parts.append(y)
        return parts[0] if len(parts) == 1 else self.home.xp.concat(parts, axis=0)

    def release_memory(self) -> None:
        """Release the memory that ``predict``, ``loss`` and ``accuracy`` keep for their next call.

        They keep about as much as their largest call needed, per concurrent thread, until the model
        is deleted. Results and parameters are not affected. The next call allocates memory again.
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
        x, home, loss = self.received(x), self.home, losses.named(loss)
        if (count := _count(x)) == 0:
            raise ArgumentError("evaluation needs at least one image, got none", self.where)
        self.kept_as(x)
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

    def accuracy(self, x: Array, t: Array, batch_size: int | None = None) -> float:
        """Return the share of images x that are classified as their label in t, 0 to 1.

        The class is the largest logit. An image with NaN among its logits counts as wrong.

        Args:
            x: images (N, *input_shape). ``t``: labels (N,) or one-hot (N, classes).
            batch_size: see ``predict``.

        Raises:
            ArgumentError: if there are no images.
        """
        x = self.received(x)
        if _count(x) == 0:
            raise ArgumentError("accuracy needs at least one image, got none", self.where)
        self.kept_as(x)
        return self.count_correct(x, self.labels(t, x.shape[0]), batch_size) / x.shape[0]

    @_at_home
    def count_correct(self, x: Array, t: Array, batch_size: int | None = None) -> int:
        """Return how many images x are classified as t, labels from ``labels``. NaN is never
        correct."""
        home = self.home
        hits = ops.is_correct(self.predict(x, batch_size), t)
        return int(home.to_host(home.xp.count_nonzero(hits)))

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
        known: Described = {}
        model = describe_layer(self, known)
        tied = {
            layer.full_name(name): owner.full_name(key)
            for layer in self.walk()
            for name, (owner, key) in layer.tied.items()
        }
        number = 2 if tied or needs_format_2(known) else 1
        header = {
            "format": number,
            "model": model,
            "input_shape": self.input_shape,
            "dtype": self.dtype,
        }
        if tied:
            header["tied"] = tied
        if self._preprocess is not None:
            header["preprocess"] = self._preprocess.description()
        if frozen := frozen_paths(self):
            header["frozen"] = frozen
        header["info"] = self.description_of_info()
        return header

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
        if header is None:
            raise ModelFormatError(
                "it does not describe its model, only weights, as files of other tools do; build "
                "the model first, then call model.load_weights(path)",
                where,
            )
        try:
            if header["format"] not in (1, 2):
                raise ModelFormatError(
                    f"it has format {shown(repr(header['format']))}, but this version reads 1 and "
                    "2; upgrade portacnn"
                )
            drawing = {} if seed is None else {"seed": seed}
            with building_from(tensors), limited(_MOST_LAYERS + 8 * len(tensors)):
                model = rebuild_layer(
                    header["model"], device=backend, dtype=header["dtype"], **drawing
                )
                if not isinstance(model, cls):
                    raise ModelFormatError(
                        f"expected a {cls.__name__}, got a {type(model).__name__}"
                    )
                if model.backend is None:
                    for name, owner in header.get("tied", {}).items():
                        _tie(model, name, owner)
                    model.build(
                        header["input_shape"], device=backend, dtype=header["dtype"], seed=seed
                    )
            model.preprocess = rebuild_preprocess(header.get("preprocess"))
            restore(model, header.get("frozen", []))
            model.info = rebuild_info(header.get("info"))
        except ModelFormatError as error:
            raise ModelFormatError(str(error), where) from error.__cause__
        except NONSENSE as error:
            what = f"{type(error).__name__}: {error}"
            raise ModelFormatError(
                f"it does not describe its model correctly: {what}", where
            ) from error
        return model


def _tie(model: Layer, name: str, owner: str) -> None:
    """Tie one parameter to another in a network that is not built yet, each named by its path."""
    (path, _, own), (other, _, theirs) = name.rpartition("."), owner.rpartition(".")
    model.layer_at(path).tie(own, model.layer_at(other), theirs)


def image_shape(
    model: str, num_classes: int, in_channels: int, input_size: int | Sequence[int]
) -> Shape:
    """Return the checked (C, H, W) of the images of a model that builds itself.

    Raises:
        ArgumentError: if an argument is out of range; the error names the model.
    """
    try:
        whole("num_classes", num_classes, 1)
        return (whole("in_channels", in_channels, 1), *per_axis("input_size", input_size, 2, 1))
    except PortacnnError as error:
        raise error.at(model)


def _reshaping(x: Array, sample: Shape) -> str:
    """Return how to reshape an array to samples (C, H, W), for a message; empty if no way is
    likely."""
    shape, (channels, *size) = tuple(x.shape), sample
    last = (*size, channels)
    turn = "permute" if hasattr(x, "permute") else "transpose"
    axes = (0, len(sample), *range(1, len(sample)))
    if len(shape) == len(sample) + 1 and shape[-1:] == (4,) and last == (*shape[1:-1], 3):
        return f"; leave out the fourth channel, opacity: x[..., :3].{turn}{axes}"
    if shape == sample:
        return "; make one image a batch: x[None]"
    if shape == last:
        return f"; channels come first, and one image must be a batch: x[None].{turn}{axes}"
    if shape[1:] == last:
        return f"; channels come first: x.{turn}{axes}"
    if channels == 1 and shape[1:] == tuple(size):
        return "; add a channel axis: x[:, None]"
    if channels == 1 and shape == tuple(size):
        return "; add a batch and a channel axis: x[None, None]"
    if len(shape) == 2 and shape[1] == prod(sample):
        return f"; x.reshape{(-1, *sample)}"
    if shape[1:] == tuple(size):
        return f"; repeat the gray images: x[:, None][:, {[0] * channels}]"
    if shape == tuple(size):
        return f"; repeat the gray image: x[None, None][:, {[0] * channels}]"
    if len(shape) == len(sample) + 1 and shape[2:] == tuple(size):
        if shape[1] == 1:
            return f"; repeat the gray channel: x[:, {[0] * channels}]"
        if shape[1] == 4 and channels == 3:
            return "; leave out the fourth channel, opacity: x[:, :3]"
        if channels == 1:
            same = "" if is_float(backend_of(x).xp, x.dtype) else ".astype(x.dtype)"
            return f"; make the channels one: x.mean(1)[:, None]{same}"
    if len(shape) == len(sample) + 1 and shape[1] == channels:
        return f"; resize the images to {'x'.join(map(str, size))} pixels"
    return ""


def _fits(preprocess: Normalize, sample: Shape, where: str) -> None:
    try:
        preprocess.check(sample)
    except PortacnnError as error:
        raise error.at(where)


# Errors that a constructor may raise for a description from a file.
NONSENSE = (
    PortacnnError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    TypeError,
    ValueError,
)


def _count(x: Array) -> int:
    """Return the number of images in x. Raises ShapeError if it has no axes."""
    backend_of(x)
    if x.ndim < 1:
        raise ShapeError(f"expected images (N, C, H, W), got {describe(x)}")
    return x.shape[0]


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
