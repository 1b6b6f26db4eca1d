"""The book's network (``ch07/simple_convnet.py``): its parameters are in one dictionary that its
layers share."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from portacnn import models, ops
from portacnn.arguments import whole
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.files import load_tensors, save_tensors
from portacnn.gradient_check import numerical_gradient
from portacnn.init import Initializer
from portacnn.layers.state import check_state
from portacnn.runtime import Array, Backend, HostArray, backend_of
from portacnn.scratch.functions import number, real
from portacnn.scratch.layers import Affine, Convolution, Pooling, Relu, SoftmaxWithLoss

_NUMBERS = {"Conv1": "1", "Affine1": "2", "Affine2": "3"}  # which W and b a layer has
_FILE = "params.safetensors"


class SimpleConvNet:
    """conv - relu - pool - affine - relu - affine - softmax: ``portacnn.SimpleConvNet`` with the
    book's names and shapes.

    Images and labels may be NumPy arrays: they are copied to the network's device. The same seed
    results in the same weights as in ``portacnn.SimpleConvNet``.

    Args:
        input_dim: (C, H, W) of one image; the book's needs H = W.
        conv_param: ``filter_num``, ``filter_size``, ``pad``, ``stride``; the defaults are 30, 5, 0,
            1.
        hidden_size: units of the hidden affine layer.
        output_size: number of classes.
        weight_init_std: a standard deviation, or any rule of ``portacnn.init``. Biases are
            initialized with 0.
        device: see ``portacnn.resolve``; None uses the variable PORTACNN_BACKEND.
        seed: seed of the weights; None draws one.
        dtype: "float32" or "float64". The book's is float64, only because NumPy's random numbers
            are.

    Attributes:
        params: W1 (filter_num, C, filter_size, filter_size), W2 (features, hidden_size), W3
            (hidden_size, output_size), b1, b2, b3. If an array is written into or replaced, the
            layers use the new values.
        layers: Conv1, Relu1, Pool1, Affine1, Relu2, Affine2.
        last_layer: the softmax with its loss.
    """

    def __init__(
        self,
        input_dim: Sequence[int] = (1, 28, 28),
        conv_param: Mapping[str, Any] | None = None,
        hidden_size: int = 100,
        output_size: int = 10,
        weight_init_std: Initializer = 0.01,
        *,
        device: str | Backend | None = None,
        seed: int | None = None,
        dtype: str = "float32",
    ) -> None:
        # portacnn.SimpleConvNet checks the arguments, draws the weights and sends them to the
        # device.
        self._model = models.SimpleConvNet(
            input_dim,
            conv_param,
            hidden_size,
            output_size,
            weight_init_std,
            device=device,
            seed=seed,
            dtype=dtype,
        )
        self._backend = self._model.home
        weights = self._model.state_dict()
        self.params: dict[str, Array] = {}
        for key, name in zip("123", ("conv1", "fc1", "fc2"), strict=True):
            W = weights[f"{name}.weight"]
            self.params[f"W{key}"] = self._backend.asarray(W.T.copy() if W.ndim == 2 else W, dtype)
            self.params[f"b{key}"] = self._backend.asarray(weights[f"{name}.bias"], dtype)

        conv = {"stride": 1, "pad": 0, **(conv_param or {})}
        self.layers: OrderedDict[str, Any] = OrderedDict()
        self.layers["Conv1"] = Convolution(
            self.params["W1"], self.params["b1"], conv["stride"], conv["pad"]
        )
        self.layers["Relu1"] = Relu()
        self.layers["Pool1"] = Pooling(pool_h=2, pool_w=2, stride=2)
        self.layers["Affine1"] = Affine(self.params["W2"], self.params["b2"])
        self.layers["Relu2"] = Relu()
        self.layers["Affine2"] = Affine(self.params["W3"], self.params["b3"])
        self.last_layer = SoftmaxWithLoss()

    def predict(self, x: Array) -> Array:
        """Return the logits (N, output_size) for images (N, *input_dim), on the network's
        device."""
        x = self._model.accept(real(x, self._model.dtype))
        for name, key in _NUMBERS.items():
            self.layers[name].W, self.layers[name].b = (
                self.params[f"W{key}"],
                self.params[f"b{key}"],
            )
        for layer in self.layers.values():
            x = layer.forward(x)
        return x

    def loss(self, x: Array, t: Array) -> float:
        """Return the mean loss of images x with labels t: whole numbers (N,) or (N, 1), or one-hot
        (N, output_size)."""
        return number(self.last_layer.forward(self.predict(x), self._labels(t, x.shape[0])))

    def accuracy(self, x: Array, t: Array, batch_size: int = 100) -> float:
        """Return the fraction of images x whose largest logit is at their label. An image with a
        logit of NaN counts as wrong.

        Every image counts. The book omits the images after the last whole batch, but divides by the
        number of all images.
        """
        count = x.shape[0]
        if not count:
            raise ArgumentError("expected at least one image, got none", "accuracy")
        batch_size = whole("batch_size", batch_size, 1)
        xp = self._backend.xp
        labels = self._labels(t, count)
        hits: Any = 0
        for first in range(0, count, batch_size):
            last = min(first + batch_size, count)
            y = self.predict(x[first:last, ...])
            hits = hits + xp.count_nonzero(ops.is_correct(y, labels[first:last]))
        return number(hits) / count

    def _labels(self, t: Array, count: int) -> Array:
        """Return labels, checked on the host, as int64 (N,) on the network's device."""
        host = backend_of(t).to_host(t)
        return self._model.labels(
            host[:, 0] if host.ndim == 2 and host.shape[1] == 1 else host, count
        )

    def gradient(self, x: Array, t: Array) -> dict[str, Array]:
        """Return the gradient of ``loss`` for each of ``params``, from a backward pass."""
        self.last_layer.forward(self.predict(x), self._labels(t, x.shape[0]))
        dout = self.last_layer.backward(1)
        for layer in reversed(self.layers.values()):
            dout = layer.backward(dout)
        grads = {}
        for name, key in _NUMBERS.items():
            grads[f"W{key}"], grads[f"b{key}"] = self.layers[name].dW, self.layers[name].db
        return grads

    def numerical_gradient(self, x: Array, t: Array, h: float = 1e-6) -> dict[str, Array]:
        """Return the gradient by differences: two forward passes per element of each parameter, for
        small networks.

        It is computed in float64 whatever the network's dtype: float32 would leave three digits.
        The book's step of 1e-4 moves a few units across the kink of a ReLU, because initial weights
        of 0.01 leave them close to 0.
        """
        own, xp = self.params, self._backend.xp
        self.params = {key: xp.astype(array, xp.float64) for key, array in own.items()}
        try:
            found = {
                key: numerical_gradient(lambda: self.loss(x, t), array, h)
                for key, array in self.params.items()
            }
        finally:
            self.params = own
        return {key: xp.astype(array, own[key].dtype) for key, array in found.items()}

    # --- files ------------------------------------------------------------------------------------

    def save_params(self, file_name: str | os.PathLike[str] = _FILE) -> None:
        """Write ``params`` as a safetensors file, whatever its name; the book writes a pickle."""
        save_tensors(
            file_name,
            {key: self._backend.to_host(array) for key, array in self.params.items()},
            None,
        )

    def load_params(self, file_name: str | os.PathLike[str] = _FILE) -> None:
        """Load a safetensors file's arrays into ``params``.

        Pickles such as the book's params.pkl are not supported, because reading one executes code
        in it. If it is your own, convert it with ``safetensors.numpy.save_file(params,
        "params.safetensors")`` in the program that made it.

        Raises:
            ModelFormatError: if it is a pickle or truncated, or names or shapes of parameters
                differ. Nothing is changed then.
        """
        tensors, _ = load_tensors(file_name)
        expected = {key: tuple(array.shape) for key, array in self.params.items()}
        found = {key: tuple(array.shape) for key, array in tensors.items()}
        if found != expected:
            raise ModelFormatError(f"expected parameters {expected}, got {found}", str(file_name))
        check_state(expected, tensors, str(file_name))
        for key, host in tensors.items():
            self._write(self.params[key], host)

    def _write(self, array: Array, host: HostArray) -> None:
        array[...] = self._backend.asarray(host, self._model.dtype)
