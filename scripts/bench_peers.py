"""The benchmark's networks in other frameworks and in the tutorials' code, for comparison by
``bench.py``.

A ``Peer`` has one network and takes arrays of its own library. This file needs no portacnn, so that
a framework which requires an old NumPy can run it in its own interpreter. All use float32 (the
tutorials' code float64), SGD with learning rate 0.01, and softmax cross-entropy.

Notation: N batch, C channels, H/W and OH/OW input and output, K kernel size.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from bench_nets import LEARNING_RATE, PLAIN, SHAPES, Conv, Peer, Pool

TORCH = ("torch", "torch-channels-last", "torch-compile", "torch-graph")
WITH_DEVICE = (*TORCH, "jax")

INFERENCE = ("onnxruntime", "portacnn-onnx")
"""Contenders that run PyTorch's ONNX export of a net, in which batch norms are folded."""

OFFERS = {
    **{word: list(SHAPES) for word in (*TORCH, *INFERENCE)},
    "jax": [*PLAIN, "resnet20"],
    "chainer": list(PLAIN),
    "dezero": list(PLAIN),
    "tutorials": ["simple"],
}
"""The networks of each peer."""


def make(name: str, net: str, device: str | None = None, onnx: str | None = None) -> Peer:
    """Return the peer called ``name`` with the network ``net``, for onnxruntime from the file
    ``onnx``. Raises ImportError if its framework is not installed.
    """
    if name == "onnxruntime":
        return OnnxRuntime(str(onnx))
    if name == "jax":
        import bench_jax

        return bench_jax.Jax(net, device or "cpu")
    if name in TORCH:
        import bench_torch

        return bench_torch.make(name, net, device or "cpu")
    made: dict[str, Callable[[str], Peer]] = {
        "chainer": Chainer,
        "dezero": DeZero,
        "tutorials": Tutorials,
    }
    return made[name](net)


def epoch(peer: Peer, sets: list[tuple[Any, Any]], batch: int, seed: int = 0) -> list[float]:
    """Do what portacnn's Trainer does in an epoch: shuffled batches, then the accuracy on training
    and test set.

    Args:
        sets: (images, labels) for training, then for testing, as returned by ``put``.
        batch: images per step.

    Returns:
        The two accuracies.
    """
    x, t = sets[0]
    order = peer.put(np.random.default_rng(seed).permutation(len(x)))
    peer.begin(training=True)
    losses = []
    for first in range(0, len(x), batch):
        chosen = order[first : first + batch]
        losses.append(peer.step(x[chosen], t[chosen]))
    if not all(np.isfinite(float(loss)) for loss in losses):
        raise ArithmeticError("the loss is not finite")
    peer.begin(training=False)
    return [
        float(sum(peer.correct(x[i : i + 256], t[i : i + 256]) for i in range(0, len(x), 256)))
        / len(x)
        for x, t in sets
    ]


# --- onnxruntime ----------------------------------------------------------------------------------


class OnnxRuntime(Peer):
    """onnxruntime on the CPU, for inference."""

    def __init__(self, path: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # onnxruntime does not read this variable itself
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        (self.name,) = (each.name for each in self.session.get_inputs())

    def predict(self, x: Any) -> Any:
        return self.session.run(None, {self.name: x})[0]


# --- Chainer and DeZero ---------------------------------------------------------------------------


class Chainer(Peer):
    """Chainer on NumPy."""

    def __init__(self, net: str) -> None:
        import chainer

        self.chainer, functions, links = chainer, chainer.functions, chainer.links
        self.calls: list[Callable[[Any], Any]] = []
        self.net = chainer.ChainList()
        for layer in PLAIN[net]:
            if isinstance(layer, Pool):
                self.calls.append(lambda h: functions.max_pooling_2d(h, 2, 2, cover_all=False))
                continue
            if isinstance(layer, Conv):
                link = links.Convolution2D(
                    layer.inputs, layer.outputs, layer.kernel, pad=layer.padding
                )
            else:
                link = links.Linear(*layer)
            self.net.append(link)
            self.calls += [link, functions.relu]
        del self.calls[-1]  # the last affine layer has no ReLU
        self.optimizer = chainer.optimizers.SGD(LEARNING_RATE)
        self.optimizer.setup(self.net)
        self.parameters = sum(p.size for p in self.net.params())

    def put(self, array: np.ndarray) -> Any:
        return array.astype(np.int32) if array.dtype.kind == "i" else array

    def step(self, x: Any, t: Any) -> Any:
        loss = self.chainer.functions.softmax_cross_entropy(self._forward(x), t)
        self.net.cleargrads()
        loss.backward()
        self.optimizer.update()
        return loss.array

    def predict(self, x: Any) -> Any:
        with self.chainer.using_config("train", False), self.chainer.no_backprop_mode():
            return self._forward(x).array

    def _forward(self, x: Any) -> Any:
        for call in self.calls:
            x = call(x)
        return x


class DeZero(Peer):
    """DeZero, the framework of "Deep Learning from Scratch 3", on NumPy."""

    def __init__(self, net: str) -> None:
        import dezero
        import dezero.functions as functions
        import dezero.layers as layers
        import dezero.optimizers as optimizers

        self.dezero, self.functions = dezero, functions
        self.calls: list[Callable[[Any], Any]] = []
        self.net = layers.Layer()
        for number, spec in enumerate(PLAIN[net]):
            if isinstance(spec, Pool):
                self.calls.append(lambda h: functions.pooling(h, 2, 2))
                continue
            if isinstance(spec, Conv):
                layer = layers.Conv2d(spec.outputs, spec.kernel, pad=spec.padding)
            else:
                layer = layers.Linear(spec.outputs)
                self.calls.append(
                    lambda h: h if h.ndim == 2 else functions.reshape(h, (h.shape[0], -1))
                )
            setattr(self.net, f"layer{number}", layer)  # registers the layer with DeZero
            self.calls += [layer, functions.relu]
        del self.calls[-1]
        self.optimizer = optimizers.SGD(LEARNING_RATE).setup(self.net)
        # the weights are created at the first input
        self.predict(np.zeros((1, *SHAPES[net]), np.float32))
        self.parameters = sum(p.data.size for p in self.net.params())

    def step(self, x: Any, t: Any) -> Any:
        loss = self.functions.softmax_cross_entropy(self._forward(x), t)
        self.net.cleargrads()
        loss.backward()
        self.optimizer.update()
        return loss.data

    def predict(self, x: Any) -> Any:
        with self.dezero.no_grad():
            return self._forward(x).data

    def _forward(self, x: Any) -> Any:
        x = self.dezero.Variable(x)
        for call in self.calls:
            x = call(x)
        return x


# --- the tutorials' code --------------------------------------------------------------------------


def im2col(x: np.ndarray, k: int, stride: int = 1) -> np.ndarray:
    """Return one row per window: x (N, C, H, W) -> (N*OH*OW, C*K*K), float64 as created by
    ``np.zeros``.
    """
    n, c, h, w = x.shape
    oh, ow = (h - k) // stride + 1, (w - k) // stride + 1
    columns = np.zeros((n, c, k, k, oh, ow))
    for i in range(k):
        for j in range(k):
            columns[:, :, i, j] = x[
                :, :, i : i + stride * oh : stride, j : j + stride * ow : stride
            ]
    return columns.transpose(0, 4, 5, 1, 2, 3).reshape(n * oh * ow, -1)


def col2im(columns: np.ndarray, shape: tuple[int, ...], k: int, stride: int = 1) -> np.ndarray:
    """Return the transpose of ``im2col``: (N*OH*OW, C*K*K) -> ``shape`` (N, C, H, W); overlapping
    windows add up.
    """
    n, c, h, w = shape
    oh, ow = (h - k) // stride + 1, (w - k) // stride + 1
    columns = columns.reshape(n, oh, ow, c, k, k).transpose(0, 3, 4, 5, 1, 2)
    x = np.zeros(shape)
    for i in range(k):
        for j in range(k):
            x[:, :, i : i + stride * oh : stride, j : j + stride * ow : stride] += columns[
                :, :, i, j
            ]
    return x


class Tutorials(Peer):
    """SimpleConvNet as in "Deep Learning from Scratch" (Saitoh, ch. 7): NumPy, float64, columns of
    an NCHW array.

    Attributes:
        weights: W1 (30, 1, 5, 5), W2 (4320, 100), W3 (100, 10), b1 (30,), b2 (100,), b3 (10,).
    """

    def __init__(self, net: str) -> None:
        rng = np.random.default_rng(0)
        shapes = {"W1": (30, 1, 5, 5), "W2": (4320, 100), "W3": (100, 10)}
        self.weights = {name: 0.01 * rng.standard_normal(shape) for name, shape in shapes.items()}
        self.weights |= {"b1": np.zeros(30), "b2": np.zeros(100), "b3": np.zeros(10)}
        self.parameters = sum(weight.size for weight in self.weights.values())

    def step(self, x: Any, t: Any) -> Any:
        loss, grads = self.gradient(x, t)
        for name, grad in grads.items():
            self.weights[name] -= LEARNING_RATE * grad
        return loss

    def predict(self, x: Any) -> Any:
        return self._forward(x)[0]

    def _forward(self, x: Any) -> tuple[Any, ...]:
        weights, n = self.weights, len(x)
        # convolution: 28 x 28 pixels become 24 x 24
        columns = im2col(x, 5)
        kernels = weights["W1"].reshape(30, -1).T
        maps = (columns @ kernels + weights["b1"]).reshape(n, 24, 24, 30).transpose(0, 3, 1, 2)
        dark = maps <= 0
        maps = maps.copy()
        maps[dark] = 0
        # pooling: 12 x 12
        windows = im2col(maps, 2, 2).reshape(-1, 4)
        largest = np.argmax(windows, axis=1)
        pooled = np.max(windows, axis=1).reshape(n, 12, 12, 30).transpose(0, 3, 1, 2)
        # two affine layers
        flat = pooled.reshape(n, -1)
        hidden = flat @ weights["W2"] + weights["b2"]
        off = hidden <= 0
        hidden[off] = 0
        return (
            hidden @ weights["W3"] + weights["b3"],
            columns,
            kernels,
            dark,
            largest,
            flat,
            hidden,
            off,
        )

    def gradient(self, x: Any, t: Any) -> tuple[Any, dict[str, np.ndarray]]:
        """Return the loss and its gradient for each of ``weights``."""
        n, each = len(x), np.arange(len(x))
        logits, columns, kernels, dark, largest, flat, hidden, off = self._forward(x)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        loss = -np.mean(np.log(shares[each, t] + 1e-7))
        grads = {}
        grad = shares
        grad[each, t] -= 1
        grad /= n
        grads["W3"], grads["b3"] = hidden.T @ grad, grad.sum(axis=0)
        grad = grad @ self.weights["W3"].T
        grad[off] = 0
        grads["W2"], grads["b2"] = flat.T @ grad, grad.sum(axis=0)
        grad = (grad @ self.weights["W2"].T).reshape(n, 30, 12, 12).transpose(0, 2, 3, 1)
        windows = np.zeros((grad.size, 4))
        windows[np.arange(grad.size), largest] = grad.flatten()
        grad = col2im(windows.reshape(n * 12 * 12, -1), (n, 30, 24, 24), 2, 2)
        grad[dark] = 0
        grad = grad.transpose(0, 2, 3, 1).reshape(-1, 30)
        grads["W1"], grads["b1"] = (columns.T @ grad).T.reshape(30, 1, 5, 5), grad.sum(axis=0)
        # the gradient of the images, which is not used; the tutorials compute it
        col2im(grad @ kernels.T, x.shape, 5)
        return loss, grads
