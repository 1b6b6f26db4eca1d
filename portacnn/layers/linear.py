"""The fully connected layer, and Flatten."""

from collections.abc import Callable
from math import prod
from typing import Any

from portacnn import ops
from portacnn.errors import ShapeError
from portacnn.init import Initializer, rule
from portacnn.layers.base import Layer, Shape
from portacnn.ops.windows import per_axis
from portacnn.runtime import Array, backend_of

__all__ = ["Flatten", "Linear"]


class Linear(Layer):
    """The affine map y = x @ weight.T + bias, as torch.nn.Linear: x (N, F) -> y (N, O).

    Args:
        in_features: F; None infers it from the input shape when the network is built.
        out_features: O.
        bias: whether to add a bias.
        weight_init, bias_init: initializers of ``portacnn.init``; default: PyTorch's.

    Parameters: ``weight`` (O, F), ``bias`` (O,).
    """

    def __init__(
        self,
        in_features: int | None,
        out_features: int,
        bias: bool = True,
        *,
        weight_init: Initializer = "default",
        bias_init: Initializer = "default",
    ) -> None:
        if in_features is not None:
            per_axis("in_features", in_features, 1, 1)
        self.in_features = in_features
        (self.out_features,) = per_axis("out_features", out_features, 1, 1)
        self.bias = bias
        rule(weight_init), rule(bias_init)
        self.weight_init, self.bias_init = weight_init, bias_init

    def infer(self, shape: Shape) -> Shape:
        if len(shape) != 1:
            raise ShapeError(f"expected samples (F,), got {shape}; put a Flatten() before it")
        (features,) = shape
        if features != (self.in_features or features):
            raise ShapeError(f"expected {self.in_features} input features, got {features}")
        fans = {"fan_in": features, "fan_out": self.out_features}
        self.declare("weight", (self.out_features, features), self.weight_init, **fans)
        if self.bias:
            self.declare("bias", (self.out_features,), self.bias_init, **fans)
        return (self.out_features,)

    def multiply_adds(self) -> int:
        return prod(self.declared["weight"].shape)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        return ops.linear(x, self.params["weight"], self.params.get("bias"), keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        dx, dweight, dbias = ops.linear_backward(dy, cache, need_dx=need_dx, **self.frozen_grads())
        self.add_grads(weight=dweight, bias=dbias)
        return dx

    def prepare(self, x: Array) -> Callable[[Array], Array]:
        return ops.linear.prepare(x, self.params["weight"], self.params.get("bias"))


class Flatten(Layer):
    """x (N, C, H, W) -> y (N, C*H*W). A view if the batch is last in memory."""

    def infer(self, shape: Shape) -> Shape:
        return (prod(shape),)

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        shape = tuple(x.shape)
        return backend_of(x).xp.reshape(x, (shape[0], prod(shape[1:]))), shape if keep else None

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return backend_of(dy).xp.reshape(dy, self.kept(cache))
