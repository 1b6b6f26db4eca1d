"""PyTorch's native kernel set: one table out of those of the modules."""

from portacnn.backends.torch import conv, norm, pool
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {**conv.KERNELS, **norm.KERNELS, **pool.KERNELS}
