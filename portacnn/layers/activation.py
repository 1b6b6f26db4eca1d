"""Activation layers: one op on the values, no parameters."""

from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import as_int
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.layers.base import Layer, Shape
from portacnn.ops import activation as checks
from portacnn.runtime import Array


class Activation(Layer, abstract=True):
    """A layer that is one op with no parameters. A subclass names the op, its backward, and which
    attributes are its options."""

    op: ClassVar[Any]
    op_backward: ClassVar[Any]
    options: ClassVar[tuple[str, ...]] = ()

    def infer(self, shape: Shape) -> Shape:
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        options = {name: getattr(self, name) for name in self.options}
        return type(self).op(x, **options, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return type(self).op_backward(dy, cache)

    def _check(self, check: Any, **options: Any) -> None:
        """Take the options as attributes, if the op's own check passes them."""
        try:
            check(**options)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        for name, value in options.items():
            setattr(self, name, value)


class ReLU(Activation):
    """max(x, 0), any shape."""

    op, op_backward = ops.relu, ops.relu_backward


class LeakyReLU(Activation):
    """x above zero, negative_slope * x below, any shape."""

    op, op_backward, options = ops.leaky_relu, ops.leaky_relu_backward, ("negative_slope",)

    def __init__(self, negative_slope: float = 0.01) -> None:
        self._check(checks.check_leaky_relu, negative_slope=negative_slope)


class ELU(Activation):
    """x above zero, alpha * (exp(x) - 1) below, any shape."""

    op, op_backward, options = ops.elu, ops.elu_backward, ("alpha",)

    def __init__(self, alpha: float = 1.0) -> None:
        self._check(checks.check_elu, alpha=alpha)


class Sigmoid(Activation):
    """1 / (1 + exp(-x)), any shape."""

    op, op_backward = ops.sigmoid, ops.sigmoid_backward


class Tanh(Activation):
    """The hyperbolic tangent, any shape."""

    op, op_backward = ops.tanh, ops.tanh_backward


class SiLU(Activation):
    """x * sigmoid(x), any shape."""

    op, op_backward = ops.silu, ops.silu_backward


class GELU(Activation):
    """x * P(X <= x) for a standard normal X, any shape; ``approximate="tanh"`` as in
    ``portacnn.ops.gelu``."""

    op, op_backward, options = ops.gelu, ops.gelu_backward, ("approximate",)

    def __init__(self, approximate: str = "none") -> None:
        self._check(checks.check_gelu, approximate=approximate)


class Softplus(Activation):
    """log(1 + exp(beta * x)) / beta, any shape; x itself where beta * x > threshold."""

    op, op_backward, options = ops.softplus, ops.softplus_backward, ("beta", "threshold")

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        self._check(checks.check_softplus, beta=beta, threshold=threshold)


class Softmax(Activation):
    """exp(x) / sum(exp(x)) along the axis ``dim``, which counts the batch, as in torch.nn.Softmax:
    1 is the channels."""

    op, op_backward, options = ops.softmax, ops.softmax_backward, ("dim",)

    def __init__(self, dim: int) -> None:
        if (number := as_int(dim)) is None:
            raise ArgumentError(f"dim must be a whole number, got {dim!r}", type(self).__name__)
        self.dim = number

    def infer(self, shape: Shape) -> Shape:
        axes = len(shape) + 1
        if not -axes <= self.dim < axes:
            raise ShapeError(
                f"dim={self.dim} is no axis of a batch of samples {shape}; it can be "
                f"{-axes}..{axes - 1}"
            )
        return shape


class LogSoftmax(Softmax):
    """x - log(sum(exp(x))) along the axis ``dim``, which counts the batch, as in
    torch.nn.LogSoftmax."""

    op, op_backward = ops.log_softmax, ops.log_softmax_backward
