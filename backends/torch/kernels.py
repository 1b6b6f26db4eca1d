"""PyTorch's native kernel set: the tables of the modules, joined."""

from portacnn.backends.torch import conv, norm, pool
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {**conv.KERNELS, **norm.KERNELS, **pool.KERNELS}
