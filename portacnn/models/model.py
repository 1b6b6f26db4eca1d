"""``Model``: a network that classifies. What ``Sequential`` is, with arrays of any kind in, and numbers and files out."""

import json
import os
from collections.abc import Sequence
from inspect import signature
from typing import Any, Self

from portacnn import ops
from portacnn.data.labels import class_indices
from portacnn.errors import ArgumentError, ArrayError, ModelFormatError, PortacnnError, ShapeError
from portacnn.files import load_tensors, save_tensors
from portacnn.gradient_check import numerical_gradient
from portacnn.layers import Layer, Sequential
from portacnn.ops.layout import pack
from portacnn.runtime import Array, Backend, backend_of, describe, dtype_name, is_float


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
        count = x.shape[0]
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
        if x.shape[0] == 0:
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

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write architecture and weights as one safetensors file, whole or not at all.

        Raises:
            ArgumentError: an argument of some layer that JSON cannot hold (a function as ``weight_init``).
        """
        header = {"format": 1, "model": _describe(self), "input_shape": self.input_shape, "dtype": self.dtype}
        save_tensors(path, self.state_dict(), header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str | Backend | None = None) -> Self:
        """Rebuild a model that ``save`` wrote, with its weights, on ``device``.

        Raises:
            ModelFormatError: not a file of portacnn's, cut short, or of another class than asked for.
        """
        tensors, header = load_tensors(path)
        try:
            if header["format"] != 1:
                raise ModelFormatError(
                    f"{path} is of format {header['format']!r}, this version reads 1; upgrade portacnn"
                )
            model = _rebuild(header["model"], device=device, dtype=header["dtype"])
            if not isinstance(model, Model) or not isinstance(model, cls):
                raise ModelFormatError(f"{path} holds a {type(model).__name__}, expected a {cls.__name__}")
            if model.backend is None:
                model.build(header["input_shape"], device=device, dtype=header["dtype"], seed=0)
        except (KeyError, TypeError, ArgumentError, ShapeError) as error:
            raise ModelFormatError(f"{path} does not say how to build its model, or not rightly: {error!r}") from error
        try:
            model.load_state_dict(tensors)
        except PortacnnError as error:
            raise error.at(str(path), over=True)
        return model


_NOT_SAVED = ("device", "seed", "dtype")


def _describe(layer: Layer) -> dict[str, Any]:
    """A layer as JSON: its class and its constructor's arguments, layers among them described in turn."""

    def plain(value: Any) -> Any:
        return _describe(value) if isinstance(value, Layer) else value

    arguments = {name: value for name, value in layer.arguments().items() if name not in _NOT_SAVED}
    positional = [plain(value) for value in arguments.pop("layers", ())]
    described = {"class": type(layer).__name__, "arguments": {name: plain(value) for name, value in arguments.items()}}
    if positional:
        described["layers"] = positional
    try:
        json.dumps(described)
    except TypeError as error:
        raise ArgumentError(f"cannot be saved: {error}", layer.where) from error
    return described


def _rebuild(described: Any, **building: Any) -> Layer:
    """The layer that ``_describe`` described. Only classes of layers can come of it, made from JSON's own values."""
    kind = Layer.known.get(described["class"])
    if kind is None:
        raise ModelFormatError(f"unknown class {described['class']!r}; import the module that defines it first")

    def made(value: Any) -> Any:
        return _rebuild(value) if isinstance(value, dict) and "class" in value else value

    layers: Sequence[Any] = [made(value) for value in described.get("layers", ())]
    taken = {name: value for name, value in building.items() if name in signature(kind).parameters}
    return kind(*layers, **{name: made(value) for name, value in described["arguments"].items()}, **taken)


def load(path: str | os.PathLike[str], *, device: str | Backend | None = None) -> Model:
    """Rebuild any model that ``Model.save`` wrote, without naming its class. See ``Model.load``."""
    return Model.load(path, device=device)
