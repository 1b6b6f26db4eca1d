"""The kernels that numba compiles for NumPy arrays: the tables of the modules, joined. They precede
NumPy's own.
"""

from portacnn.backends.numba import conv, depthwise, norm, pool
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {**conv.KERNELS, **norm.KERNELS, **depthwise.KERNELS, **pool.KERNELS}
