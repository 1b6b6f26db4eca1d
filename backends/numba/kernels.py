"""The kernels that numba compiles for NumPy arrays: one table out of those of the modules. It comes
before NumPy's own."""

from portacnn.backends.numba import conv, norm
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {**conv.KERNELS, **norm.KERNELS}
