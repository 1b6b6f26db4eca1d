"""The CUDA kernels of CuPy's backend: one table out of those of the modules.

Importing this needs no CuPy: sources are compiled when first launched.
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
