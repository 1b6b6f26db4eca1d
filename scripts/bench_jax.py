"""The benchmark's networks written by hand in plain JAX, for ``bench_peers.make``: pure functions
of parameters, one ``jax.jit`` for the whole step, with the parameters' memory reused (donated).

Notation: N batch, C channels, H/W input.
"""

from typing import Any

import numpy as np
from bench_nets import LEARNING_RATE, PLAIN, Conv, Peer, Pool

NETS = (*PLAIN, "resnet20")


class Jax(Peer):
    """Plain JAX: SGD, batch norm with running statistics, float32."""

    def __init__(self, net: str, device: str) -> None:
        import jax

        self.jax = jax
        kind, _, number = device.partition(":")
        self.device = jax.local_devices(backend=kind)[int(number or 0)]
        params, self.state, self.apply = _resnet20() if net == "resnet20" else _plain(net)
        self.params = jax.device_put(params, self.device)
        self.state = jax.device_put(self.state, self.device)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._step = jax.jit(self._one, donate_argnums=(0, 1))
        self._predict = jax.jit(lambda params, state, x: self.apply(params, state, x, False)[0])
        self.last: Any = None

    def _one(self, params: Any, state: Any, x: Any, t: Any) -> Any:
        jax = self.jax

        def loss_of(params: Any) -> Any:
            logits, new = self.apply(params, state, x, True)
            rows = jax.nn.log_softmax(logits)
            return -jax.numpy.take_along_axis(rows, t[:, None], axis=1).mean(), new

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - LEARNING_RATE * g, params, grads), new, loss

    def put(self, array: np.ndarray) -> Any:
        return self.jax.device_put(array, self.device)

    def step(self, x: Any, t: Any) -> Any:
        with self.jax.default_matmul_precision("highest"):
            self.params, self.state, self.last = self._step(self.params, self.state, x, t)
        return self.last

    def predict(self, x: Any) -> Any:
        with self.jax.default_matmul_precision("highest"):
            self.last = self._predict(self.params, self.state, x)
        return self.last

    def synchronize(self) -> None:
        if self.last is not None:
            self.last.block_until_ready()
            self.jax.block_until_ready(self.params)


def _conv(x: Any, weight: Any, stride: int, padding: int) -> Any:
    from jax import lax

    return lax.conv_general_dilated(x, weight, (stride, stride), [(padding, padding)] * 2)


def _weights(rng: Any, *shape: int) -> np.ndarray:
    """Return weights (O, I, ...) with He's standard deviation."""
    scale = (2.0 / np.prod(shape[1:])) ** 0.5
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def _plain(net: str) -> tuple[Any, Any, Any]:
    """Return the parameters, the (empty) state and the function of a net without branches."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    rng, params = np.random.default_rng(0), []
    for layer in PLAIN[net]:
        if isinstance(layer, Conv):
            shape = (layer.outputs, layer.inputs, layer.kernel, layer.kernel)
            params.append((_weights(rng, *shape), np.zeros(layer.outputs, np.float32)))
        elif not isinstance(layer, Pool):
            shape = layer.outputs, layer.inputs
            params.append((_weights(rng, *shape), np.zeros(layer.outputs, np.float32)))

    def apply(params: Any, state: Any, x: Any, train: bool) -> Any:
        of = iter(params)
        for number, layer in enumerate(PLAIN[net], 1):
            if isinstance(layer, Conv):
                weight, bias = next(of)
                x = _conv(x, weight, 1, layer.padding) + bias[:, None, None]
                x = jax.nn.relu(x)
            elif isinstance(layer, Pool):
                window = (1, 1, 2, 2)
                x = lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")
            else:
                weight, bias = next(of)
                x = x.reshape(x.shape[0], -1) @ weight.T + bias
                x = x if number == len(PLAIN[net]) else jax.nn.relu(x)
        return x, state

    return params, (), apply


def _resnet20() -> tuple[Any, Any, Any]:
    """Return parameters, running statistics and function of ResNet20 (see ``bench_torch_nets``)."""
    import jax
    from jax import numpy as jnp

    rng = np.random.default_rng(0)
    widths = [16] * 3 + [32] * 3 + [64] * 3
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1]
    convs = [(3, 16)]
    for inputs, outputs in zip([16, *widths[:-1]], widths, strict=True):
        convs += [(inputs, outputs), (outputs, outputs)]
    ones = [np.ones(width, np.float32) for _, width in convs]
    params = {
        "conv": [_weights(rng, outputs, inputs, 3, 3) for inputs, outputs in convs],
        "norm": [(one, np.zeros_like(one)) for one in ones],
        "fc": (_weights(rng, 10, 64), np.zeros(10, np.float32)),
    }

    def apply(params: Any, state: Any, x: Any, train: bool) -> Any:
        new = []

        def conv_norm(x: Any, stride: int) -> Any:
            number = len(new)
            x = _conv(x, params["conv"][number], stride, 1)
            mean, var = state[number]
            if train:
                batch_mean, batch_var = x.mean((0, 2, 3)), x.var((0, 2, 3))
                count = x.size / x.shape[1]
                new.append(
                    (
                        0.9 * mean + 0.1 * batch_mean,
                        0.9 * var + 0.1 * batch_var * (count / (count - 1)),
                    )
                )
                mean, var = batch_mean, batch_var
            else:
                new.append((mean, var))
            weight, bias = params["norm"][number]
            scale = weight / jnp.sqrt(var + 1e-5)
            return (x - mean[:, None, None]) * scale[:, None, None] + bias[:, None, None]

        x = jax.nn.relu(conv_norm(x, 1))
        for width, stride in zip(widths, strides, strict=True):
            short, more = x, width - x.shape[1]
            if stride != 1 or more:
                pads = ((0, 0), (more // 2, more - more // 2), (0, 0), (0, 0))
                short = jnp.pad(x[:, :, ::stride, ::stride], pads)
            x = jax.nn.relu(conv_norm(jax.nn.relu(conv_norm(x, stride)), 1) + short)
        weight, bias = params["fc"]
        return x.mean((2, 3)) @ weight.T + bias, new

    return params, [(np.zeros_like(one), one) for one in ones], apply
