"""More activation layers: see ``portacnn.ops.activation``."""

from collections.abc import Sequence
from typing import Any

from portacnn import ops
from portacnn.arguments import wholes
from portacnn.errors import PortacnnError
from portacnn.init import constant
from portacnn.layers.activation import Activation
from portacnn.layers.base import Layer, Shape
from portacnn.ops import activation as checks
from portacnn.ops.pointwise import check_elementwise
from portacnn.runtime import Array


class _ScaledELU(Activation):
    op, op_backward, options = ops.scaled_elu, ops.scaled_elu_backward, ("alpha", "beta", "gamma")


class SELU(_ScaledELU):
    """gamma * x above zero, gamma * alpha * (exp(x) - 1) below, any shape (Klambauer et al.,
    2017)."""

    def __init__(
        self, alpha: float = 1.6732632423543772, gamma: float = 1.0507009873554805
    ) -> None:
        self._check(checks.check_scaled_elu, alpha=alpha, beta=1.0, gamma=gamma)


class CELU(_ScaledELU):
    """x above zero, alpha * (exp(x / alpha) - 1) below, any shape (Barron, 2017); alpha is not
    0."""

    def __init__(self, alpha: float = 1.0) -> None:
        self._check(
            checks.check_scaled_elu,
            alpha=alpha,
            beta=1.0 / alpha if alpha else float("inf"),
            gamma=1.0,
        )


class HardSigmoid(Activation):
    """max(0, min(1, alpha * x + beta)), any shape; torch.nn.Hardsigmoid's numbers by default."""

    op, op_backward, options = ops.hard_sigmoid, ops.hard_sigmoid_backward, ("alpha", "beta")

    def __init__(self, alpha: float = 1.0 / 6.0, beta: float = 0.5) -> None:
        self._check(checks.check_hard_sigmoid, alpha=alpha, beta=beta)


class HardSwish(Activation):
    """x * max(0, min(1, x / 6 + 1/2)), any shape."""

    op, op_backward = ops.hard_swish, ops.hard_swish_backward


class Clip(Activation):
    """x kept between ``min`` and ``max``, either of which may be None, any shape. Clip(0, 6) is
    ReLU6."""

    op, op_backward, options = ops.clip, ops.clip_backward, ("min", "max")

    def __init__(self, min: float | None = None, max: float | None = None) -> None:
        self._check(checks.check_clip, min=min, max=max)


class Elementwise(Activation):
    """A function of each element, any shape: a name of ``portacnn.ops.arithmetic.FUNCTIONS``, such
    as "erf" or "mish"."""

    op, op_backward, options = ops.elementwise, ops.elementwise_backward, ("function",)

    def __init__(self, function: str) -> None:
        self._check(check_elementwise, function=function)


class PReLU(Layer):
    """x above zero, slope * x below, with slopes that are learnt: x (N, *S) -> y of its shape.

    Args:
        shape: the slopes', broadcast to a sample with the last axis its last: (1,) is one for all,
            (C, 1, 1) one for each channel.

    Parameters: ``weight`` (*shape), 0.25 at first, as in PyTorch.
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
        dx, dslope = ops.prelu_backward(dy, cache, need_dx=need_dx)
        self.add_grads(weight=dslope)
        return dx
