"""The kernels that numba compiles for NumPy arrays: the tables of the modules, joined. They precede
NumPy's own.
"""

from portacnn.backends.numba import clip, conv, grouped, norm, pool
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {
    **clip.KERNELS,
    **conv.KERNELS,
    **grouped.KERNELS,
    **norm.KERNELS,
    **pool.KERNELS,
}
