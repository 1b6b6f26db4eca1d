"""Every op that CUDA kernels of our own compute. Loading this needs no CuPy: sources are compiled when first launched."""

from portacnn.backends import (
    cupy_columns,
    cupy_conv,
    cupy_dropout,
    cupy_elementwise,
    cupy_linear,
    cupy_loss,
    cupy_norm,
    cupy_pool,
    cupy_updates,
)
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {
    **cupy_columns.KERNELS,
    **cupy_conv.KERNELS,
    **cupy_dropout.KERNELS,
    **cupy_elementwise.KERNELS,
    **cupy_linear.KERNELS,
    **cupy_loss.KERNELS,
    **cupy_norm.KERNELS,
    **cupy_pool.KERNELS,
    **cupy_updates.KERNELS,
}
