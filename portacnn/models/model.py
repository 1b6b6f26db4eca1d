"""``Model``: a network that classifies. What ``Sequential`` is, with arrays of any kind in, and numbers and files out."""

import os
from collections.abc import Sequence
from typing import Self

from portacnn import ops
from portacnn.arguments import whole
from portacnn.data.labels import class_indices
from portacnn.errors import ArgumentError, ArrayError, ModelFormatError, PortacnnError, ShapeError
from portacnn.files import load_tensors, save_tensors
from portacnn.gradient_check import numerical_gradient
from portacnn.layers import Sequential
from portacnn.layers.base import Shape, building_from
from portacnn.models.description import describe_layer, rebuild_layer
from portacnn.models.summary import table
from portacnn.ops.layout import pack
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, Backend, backend_of, describe, dtype_name, is_float, resolve


class Model(Sequential):
    """A ``Sequential`` that ends in one number for each class.

    Images come in as NumPy arrays or as arrays of the model's own library and device, floating point, (N, *input_shape);
    labels as integers (N,) or one-hot (N, classes).

        model = Model(conv1=Conv2d(1, 8, 3), relu1=ReLU(), flatten=Flatten(), fc1=Linear(None, 10))
        model.build((1, 28, 28), device="cuda", seed=0)
    """

    def accept(self, x: Array) -> Array:
        """Images from outside as the model takes them: on its device and of its dtype; x itself where it is so already.

        Raises:
            ArrayError: integers, or an array of another library or device; a NumPy array may always come.
            ShapeError: not (N, *input_shape).
        """
        home = self._home()
        source = backend_of(x)
        if not is_float(source.xp, x.dtype):
            raise ArrayError(
                f"expected floating-point images, got {describe(x)}; scale them first: x.astype('float32') / 255, or "
                "load_mnist(normalize=True)",
                self.where,
            )
        if tuple(x.shape[1:]) != self.input_shape or x.ndim < 1:
            raise ShapeError(
                f"expected images (N, {', '.join(map(str, self.input_shape))}), got {describe(x)}", self.where
            )
        if source.name == home.name and x.device == home.device:
            return x if dtype_name(x) == self.dtype else home.xp.astype(x, home.dtype(self.dtype))
        if source.name == "numpy":
            return home.asarray(x, self.dtype)
        raise ArrayError(f"the model is on {home}, the images are {describe(x)}; move one of them", self.where)

    def _batch(self, x: Array) -> Array:
        return pack(self.accept(x))

    def labels(self, t: Array, count: int, what: str = "labels") -> Array:
        """Labels from outside, checked on the host, as int64 (count,) on the model's device. Raises LabelError."""
        home = self._home()
        return home.asarray(class_indices(backend_of(t).to_host(t), count, self.classes, what))

    @property
    def classes(self) -> int:
        """How many outputs there are."""
        if len(self.output_shape) != 1:
            raise ShapeError(f"expected a network with one output for each class, this one gives {self.output_shape}")
        return self.output_shape[0]

    def predict(self, x: Array, batch_size: int = 256) -> Array:
        """The logits (N, classes) for images x, on the model's device; nothing is kept for a backward pass.

        ``batch_size`` images go through at a time. Softmax is left out: the largest logit is the likeliest class.
        """
        if batch_size < 1:
            raise ArgumentError(f"batch_size must be at least 1, got {batch_size}", self.where)
        count = _count(x)
        if count <= batch_size:
            return self.forward(self._batch(x), keep=False)
        starts = range(0, count, batch_size)
        parts = [self.forward(self._batch(x[i : min(i + batch_size, count), ...]), keep=False) for i in starts]
        return self._home().xp.concat(parts, axis=0)

    def loss(self, x: Array, t: Array) -> float:
        """The mean softmax cross-entropy of the images x with labels t, as a Python number."""
        logits = self.forward(self._batch(x), keep=False)
        loss, _ = ops.softmax_cross_entropy(logits, self.labels(t, x.shape[0]), keep=False)
        return float(self._home().to_host(loss))

    def accuracy(self, x: Array, t: Array, batch_size: int = 256) -> float:
        """The share of images x whose largest logit is their label's; every one counts, the last short batch too."""
        if _count(x) == 0:
            raise ArgumentError("the accuracy over no images is not defined", self.where)
        return self.count_correct(x, self.labels(t, x.shape[0]), batch_size) / x.shape[0]

    def count_correct(self, x: Array, t: Array, batch_size: int = 256) -> int:
        """How many of the images x are classified as t, which is as ``labels`` gives it."""
        home = self._home()
        hits = home.xp.argmax(self.predict(x, batch_size), axis=1) == t
        return int(home.to_host(home.xp.count_nonzero(hits)))

    def gradient(self, x: Array, t: Array) -> dict[str, Array]:
        """The gradient of ``loss`` for every parameter, by backward pass: copies, by the parameter's path."""
        xp = self._home().xp
        labels = self.labels(t, x.shape[0])
        _, cache = ops.softmax_cross_entropy(self.forward(self._batch(x), keep=True), labels)
        self.backward(ops.softmax_cross_entropy_backward(1.0, cache), need_dx=False)
        return {path: xp.asarray(gradient, copy=True) for path, gradient in self.named_gradients().items()}

    def numerical_gradient(self, x: Array, t: Array, h: float = 1e-4) -> dict[str, Array]:
        """The same by finite differences, two forward passes for each number of each parameter: for small nets, in float64."""
        return {
            path: numerical_gradient(lambda: self.loss(x, t), array, h)
            for path, array in self.named_parameters().items()
        }

    # --- description ------------------------------------------------------------------------------------------------

    def summary(self, input_shape: Sequence[int] | None = None, batch_size: int = 1) -> str:
        """A table of the layers: path, class, output shape, parameters, multiply-adds and activation memory, with totals.

        Nothing is allocated and the network stays as it is, so it may be asked of a network not built yet, or about another
        input than it was built for. Multiply-adds are those of one sample's forward pass, in convolutions and linear maps.
        The memory is that of each layer's output for a batch: what a forward pass makes, counted as if nothing were a view.

        Args:
            input_shape: of one sample, (C, H, W); by default the one it was built for.
            batch_size: of how many samples the memory is.

        Raises:
            StateError: no ``input_shape``, and not built yet.
            ShapeError: the network does not take such samples.
        """
        if input_shape is None:
            self._home()
            input_shape = self.input_shape
        return table(self, input_shape, whole("batch_size", batch_size, 1))

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write architecture and weights as one safetensors file, whole or not at all.

        Raises:
            ArgumentError: an argument of some layer that JSON cannot hold (a function as ``weight_init``).
        """
        header = {"format": 1, "model": describe_layer(self), "input_shape": self.input_shape, "dtype": self.dtype}
        save_tensors(path, self.state_dict(), header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | Backend | None = None) -> Self:
        """Rebuild a model that ``save`` wrote, with its weights, on ``device``.

        Raises:
            ModelFormatError: not a file of portacnn's, cut short, or of another class than asked for.
        """
        backend = resolve(device)
        tensors, header = load_tensors(path)
        try:
            if header["format"] != 1:
                raise ModelFormatError(f"it is of format {header['format']!r}, this version reads 1; upgrade portacnn")
            with building_from(tensors):
                model = rebuild_layer(header["model"], device=backend, dtype=header["dtype"])
                if not isinstance(model, cls):
                    raise ModelFormatError(f"holds a {type(model).__name__}, expected a {cls.__name__}")
                if model.backend is None:
                    model.build(header["input_shape"], device=backend, dtype=header["dtype"])
        except ModelFormatError as error:
            raise error.at(str(path), over=True)
        except _NONSENSE as error:
            what = f"{type(error).__name__}: {error}"
            raise ModelFormatError(
                f"it does not say how to build its model, or not rightly: {what}", str(path)
            ) from error
        return model


def image_shape(model: str, num_classes: int, in_channels: int, input_size: int | Sequence[int]) -> Shape:
    """(C, H, W) of the images of a model that builds itself, once its numbers have proved to be such.

    Raises:
        ArgumentError: naming the model.
    """
    try:
        whole("num_classes", num_classes, 1)
        return (whole("in_channels", in_channels, 1), *per_axis("input_size", input_size, 2, 1))
    except PortacnnError as error:
        raise error.at(model)


# What JSON made by others can bring a constructor to.
_NONSENSE = (
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
    """How many images there are in x, once it has proved to be an array with a first axis."""
    backend_of(x)
    if x.ndim < 1:
        raise ShapeError(f"expected images (N, C, H, W), got {describe(x)}")
    return x.shape[0]


def load(path: str | os.PathLike[str], *, device: str | Backend | None = None) -> Model:
    """Rebuild any model that ``Model.save`` wrote, without naming its class. See ``Model.load``."""
    return Model.load(path, device=device)
