"""The kernels that numba compiles for NumPy arrays: the tables of the modules, joined. They precede
NumPy's own.
"""

from portacnn.backends.numba import clip, conv, depthwise, norm, pool
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {
    **clip.KERNELS,
    **conv.KERNELS,
    **depthwise.KERNELS,
    **norm.KERNELS,
    **pool.KERNELS,
}
