"""The optimizers: each hands parameters, gradients and state to an op of ``ops.update``."""

from typing import Any

from portacnn import ops
from portacnn.arguments import flag, fraction, not_negative
from portacnn.errors import ArgumentError
from portacnn.ops.update import count_as_float
from portacnn.optim.base import Optimizer
from portacnn.optim.groups import Groups
from portacnn.runtime import Array, backend_of
from portacnn.selection import Selection


class SGD(Optimizer):
    """Stochastic gradient descent, as torch.optim.SGD.

    p -= lr * g. With momentum: v = momentum * v + g; p -= lr * v. The first v is g.

    Args:
        lr: the learning rate.
        momentum: share of the velocity that is kept, 0 <= momentum < 1; 0 stores no velocity.
        dampening: share of the gradient that is not added to the velocity.
        nesterov: use Nesterov's momentum: p -= lr * (g + momentum * v).
        weight_decay: factor of the L2 penalty. ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.

    Raises:
        ArgumentError: if a number is out of range, or nesterov is used without momentum or with
            dampening.
    """

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        self.momentum, self.dampening = (
            fraction("momentum", momentum),
            fraction("dampening", dampening),
        )
        self.nesterov = flag("nesterov", nesterov)
        if nesterov and (not momentum or dampening):
            raise ArgumentError(
                f"nesterov needs momentum above 0 and no dampening, got momentum={momentum!r}, "
                f"dampening={dampening!r}"
            )
        self.slots = ("velocity",) if self.momentum else ()
        super().__init__(lr, weight_decay, no_decay, groups)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        if not self.momentum:
            ops.sgd_update(params, grads, **common)
            return
        rates = {"momentum": self.momentum, "dampening": self.dampening, "nesterov": self.nesterov}
        first = step == 1 if self.dampening else False  # else it makes no difference
        ops.momentum_update(params, grads, state["velocity"], **rates, first=first, **common)


class Momentum(SGD):
    """``SGD`` under the tutorials' name, with momentum 0.9: v = momentum * v + g; p -= lr * v."""

    def __init__(
        self,
        lr: float = 0.01,
        momentum: float = 0.9,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, momentum, dampening, nesterov, weight_decay, no_decay, groups)


class AdaGrad(Optimizer):
    """AdaGrad (Duchi, Hazan and Singer, 2011), as torch.optim.Adagrad.

    s += g^2; p -= lr * g / (sqrt(s) + eps).

    Args:
        lr: the learning rate. At a parameter's step t (from 1) it is lr / (1 + (t - 1) * lr_decay).
        lr_decay: see lr.
        weight_decay: factor of the L2 penalty. ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.
        initial_accumulator_value: initial value of s.
        eps: avoids division by 0.

    Raises:
        ArgumentError: if a number is out of range.
    """

    slots = ("square_sum",)

    def __init__(
        self,
        lr: float = 0.01,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, no_decay, groups)
        self.lr_decay = not_negative("lr_decay", lr_decay)
        self.initial_accumulator_value = not_negative(
            "initial_accumulator_value", initial_accumulator_value
        )
        self.eps = not_negative("eps", eps)

    def fresh(self, slot: str, p: Array) -> Array:
        """Return the initial state of a parameter: ``initial_accumulator_value``."""
        return backend_of(p).xp.full_like(p, self.initial_accumulator_value)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        if self.lr_decay:
            common["lr"] = common["lr"] / (1.0 + (count_as_float(step) - 1.0) * self.lr_decay)
        ops.adagrad_update(params, grads, state["square_sum"], eps=self.eps, **common)


class RMSprop(Optimizer):
    """RMSprop (Hinton's lecture 6e), as torch.optim.RMSprop.

    s = alpha * s + (1 - alpha) * g^2; p -= lr * g / (sqrt(s) + eps).

    Args:
        lr: the learning rate.
        alpha: share of the running means that is kept, 0 <= alpha < 1.
        eps: avoids division by 0.
        weight_decay: factor of the L2 penalty. ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.
        momentum: share of the velocity that is kept; 0 stores no velocity.
        centered: divide by the standard deviation, with the mean subtracted (Graves, 2013).

    Raises:
        ArgumentError: if a number is out of range.
    """

    def __init__(
        self,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        self.alpha, self.momentum = fraction("alpha", alpha), fraction("momentum", momentum)
        self.eps, self.centered = not_negative("eps", eps), flag("centered", centered)
        self.slots = (
            "mean_square",
            *(("mean",) if self.centered else ()),
            *(("velocity",) if self.momentum else ()),
        )
        super().__init__(lr, weight_decay, no_decay, groups)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        rates = {"alpha": self.alpha, "eps": self.eps, "momentum": self.momentum}
        slots = (state["mean_square"], state.get("mean"), state.get("velocity"))
        ops.rmsprop_update(params, grads, *slots, **rates, **common)


class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015), as torch.optim.Adam.

    m = beta1 * m + (1 - beta1) * g; s = beta2 * s + (1 - beta2) * g^2; at step t, from 1, p -= lr *
    (m / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps).

        >>> Adam(lr=0.01).lr
        0.01

    Args:
        lr: the learning rate.
        beta1, beta2: shares of the running means of gradients and of their squares that are kept.
        eps: avoids division by 0.
        weight_decay: factor of the L2 penalty, or of AdamW's decay with ``decoupled_weight_decay``.
            ``no_decay``: the parameters without it.
        groups: learning rates and weight decay by pattern, see ``Optimizer``.

    Raises:
        ArgumentError: if a number is out of range.
    """

    slots = ("mean", "mean_square")

    def __init__(
        self,
        lr: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, weight_decay, no_decay, groups)
        self.beta1, self.beta2 = fraction("beta1", beta1), fraction("beta2", beta2)
        self.eps = not_negative("eps", eps)
        self.decoupled_weight_decay = flag("decoupled_weight_decay", decoupled_weight_decay)

    def apply(
        self,
        params: list[Array],
        grads: list[Array],
        state: dict[str, list[Array]],
        step: Any,
        **common: Any,
    ) -> None:
        rates = {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "decoupled": self.decoupled_weight_decay,
        }
        ops.adam_update(
            params, grads, state["mean"], state["mean_square"], step=step, **rates, **common
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), as torch.optim.AdamW.

    Before Adam's update, p -= lr * weight_decay * p. Arguments: see ``Adam``.
    """

    def __init__(
        self,
        lr: float = 0.001,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        no_decay: Selection = (),
        groups: Groups | None = None,
    ) -> None:
        super().__init__(lr, beta1, beta2, eps, weight_decay, True, no_decay, groups)
