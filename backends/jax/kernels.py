"""The kernels of the JAX backend: the tables of the modules, joined. What is not in them is the
portable op, which XLA compiles as it is."""

from typing import Any

import jax

from portacnn.backends.jax import conv, norm, numbers, pool
from portacnn.backends.jax.arrays import JaxArray
from portacnn.backends.jax.compiled import compiled
from portacnn.runtime import Kernel


@compiled
def erf(x: Any) -> Any:
    return JaxArray(jax.lax.erf(x.held))


KERNELS: dict[str, Kernel] = {
    **conv.KERNELS,
    **norm.KERNELS,
    **numbers.KERNELS,
    **pool.KERNELS,
    "erf": Kernel(erf),
}
