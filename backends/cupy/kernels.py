"""The CUDA kernels of the CuPy backend: the tables of the modules, joined.

Importing this module does not need CuPy: sources are compiled at the first launch.
"""

from portacnn.backends.cupy import (
    columns,
    conv,
    dropout,
    elementwise,
    linear,
    loss,
    norm,
    pool,
    updates,
)
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {
    **columns.KERNELS,
    **conv.KERNELS,
    **dropout.KERNELS,
    **elementwise.KERNELS,
    **linear.KERNELS,
    **loss.KERNELS,
    **norm.KERNELS,
    **pool.KERNELS,
    **updates.KERNELS,
}
