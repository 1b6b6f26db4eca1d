"""Activation layers: x (N, *S) -> y of the same shape. Each applies one op to each element or along
one axis."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from portacnn import ops
from portacnn.arguments import as_int, wholes
from portacnn.errors import ArgumentError, PortacnnError, ShapeError
from portacnn.init import constant
from portacnn.layers.base import Layer, Shape
from portacnn.ops import activation as checks
from portacnn.ops.pointwise import check_elementwise
from portacnn.runtime import Array

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Clip",
    "Elementwise",
    "HardSigmoid",
    "HardSwish",
    "LeakyReLU",
    "LogSoftmax",
    "PReLU",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Tanh",
]


class Activation(Layer, abstract=True):
    """A layer that runs one op without parameters. A subclass names the op and its backward op.

    A subclass with options calls ``take`` in its constructor. Each option becomes an attribute and
    is passed to the op as a keyword.
    """

    op: ClassVar[Any]
    op_backward: ClassVar[Any]
    options: tuple[str, ...] = ()

    def take(self, check: Callable[..., object], **options: Any) -> None:
        """Check the options with the op's ``check`` and set them as attributes."""
        try:
            check(**options)
        except PortacnnError as error:
            raise error.at(type(self).__name__)
        self.options = tuple(options)
        vars(self).update(options)

    def infer(self, shape: Shape) -> Shape:
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        options = {name: getattr(self, name) for name in self.options}
        return type(self).op(x, **options, keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        return type(self).op_backward(dy, cache)


# --- piecewise linear -----------------------------------------------------------------------------


class ReLU(Activation):
    """max(x, 0)."""

    op, op_backward = ops.relu, ops.relu_backward


class LeakyReLU(Activation):
    """x above zero, negative_slope * x below."""

    op, op_backward = ops.leaky_relu, ops.leaky_relu_backward

    def __init__(self, negative_slope: float = 0.01) -> None:
        self.take(checks.check_leaky_relu, negative_slope=negative_slope)


class PReLU(Layer):
    """x above zero, slope * x below, with trained slopes: x (N, *S) -> y of the same shape.

    Args:
        shape: of the slopes, broadcast against one sample: (1,) is one slope for all elements, (C,
            1, 1) one for each channel.

    Parameters: ``weight`` (*shape), initially 0.25, as in PyTorch.
    """

    def __init__(self, shape: Sequence[int] = (1,)) -> None:
        try:
            self.shape = wholes("shape", shape, 1)
        except PortacnnError as error:
            raise error.at(type(self).__name__)

    def infer(self, shape: Shape) -> Shape:
        checks.check_spread(self.shape, shape, None, f"samples {shape}")
        self.declare("weight", self.shape, constant(0.25))
        return shape

    def forward(self, x: Array, *, train: bool = False, keep: bool = True) -> tuple[Array, Any]:
        self.check_built()
        return ops.prelu(x, self.params["weight"], keep=keep)

    def backward(self, dy: Array, cache: Any, *, need_dx: bool = True) -> Array | None:
        dx, dslope = ops.prelu_backward(
            dy, cache, need_dx=need_dx, need_dslope=not self.is_frozen("weight")
        )
        self.add_grads(weight=dslope)
        return dx


class Clip(Activation):
    """x limited to ``min``..``max``; None means no limit. Clip(0, 6) is ReLU6."""

    op, op_backward = ops.clip, ops.clip_backward

    def __init__(self, min: float | None = None, max: float | None = None) -> None:
        self.take(checks.check_clip, min=min, max=max)


class HardSigmoid(Activation):
    """max(0, min(1, alpha * x + beta)); the defaults are torch.nn.Hardsigmoid's."""

    op, op_backward = ops.hard_sigmoid, ops.hard_sigmoid_backward

    def __init__(self, alpha: float = 1.0 / 6.0, beta: float = 0.5) -> None:
        self.take(checks.check_hard_sigmoid, alpha=alpha, beta=beta)


class HardSwish(Activation):
    """x * max(0, min(1, x / 6 + 1/2))."""

    op, op_backward = ops.hard_swish, ops.hard_swish_backward


# --- exponential ----------------------------------------------------------------------------------


class ELU(Activation):
    """x above zero, alpha * (exp(x) - 1) below."""

    op, op_backward = ops.elu, ops.elu_backward

    def __init__(self, alpha: float = 1.0) -> None:
        self.take(checks.check_elu, alpha=alpha)


class SELU(Activation):
    """gamma * x above zero, gamma * alpha * (exp(x) - 1) below (Klambauer et al., 2017)."""

    op, op_backward = ops.scaled_elu, ops.scaled_elu_backward

    def __init__(
        self, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805
    ) -> None:
        self.take(checks.check_scaled_elu, alpha=alpha, beta=1.0, gamma=gamma)


class CELU(Activation):
    """x above zero, alpha * (exp(x / alpha) - 1) below (Barron, 2017); alpha is not 0."""

    op, op_backward = ops.scaled_elu, ops.scaled_elu_backward

    def __init__(self, alpha: float = 1.0) -> None:
        beta = 1.0 / alpha if alpha else float("inf")
        self.take(checks.check_scaled_elu, alpha=alpha, beta=beta, gamma=1.0)


class Sigmoid(Activation):
    """1 / (1 + exp(-x))."""

    op, op_backward = ops.sigmoid, ops.sigmoid_backward


class Tanh(Activation):
    """The hyperbolic tangent."""

    op, op_backward = ops.tanh, ops.tanh_backward


class SiLU(Activation):
    """x * sigmoid(x)."""

    op, op_backward = ops.silu, ops.silu_backward


class GELU(Activation):
    """x * P(X <= x) for a standard normal X; ``approximate="tanh"`` as in ``portacnn.ops.gelu``."""

    op, op_backward = ops.gelu, ops.gelu_backward

    def __init__(self, approximate: str = "none") -> None:
        self.take(checks.check_gelu, approximate=approximate)


class Softplus(Activation):
    """log(1 + exp(beta * x)) / beta; x if beta * x > threshold."""

    op, op_backward = ops.softplus, ops.softplus_backward

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        self.take(checks.check_softplus, beta=beta, threshold=threshold)


class Elementwise(Activation):
    """A function of each element, by its name in ``portacnn.ops.pointwise.FUNCTIONS``, such as
    "erf" or "mish"."""

    op, op_backward = ops.elementwise, ops.elementwise_backward

    def __init__(self, function: str) -> None:
        self.take(check_elementwise, function=function)


# --- along an axis --------------------------------------------------------------------------------


class Softmax(Activation):
    """exp(x) / sum(exp(x)) along the axis ``dim``. The batch is axis 0, as in torch.nn.Softmax; the
    channels are axis 1."""

    op, op_backward = ops.softmax, ops.softmax_backward

    def __init__(self, dim: int) -> None:
        if (number := as_int(dim)) is None:
            raise ArgumentError(f"dim must be a whole number, got {dim!r}", type(self).__name__)
        self.dim, self.options = number, ("dim",)

    def infer(self, shape: Shape) -> Shape:
        axes = len(shape) + 1
        if not -axes <= self.dim < axes:
            raise ShapeError(
                f"dim={self.dim} is out of range for a batch of samples {shape}; expected "
                f"{-axes}..{axes - 1}"
            )
        return shape


class LogSoftmax(Softmax):
    """x - log(sum(exp(x))) along the axis ``dim``. The batch is axis 0, as in
    torch.nn.LogSoftmax."""

    op, op_backward = ops.log_softmax, ops.log_softmax_backward
