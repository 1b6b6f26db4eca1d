"""Every op that CUDA kernels of our own compute. Loading this needs no CuPy: sources are compiled when first launched."""

from portacnn.backends import cupy_columns, cupy_conv, cupy_linear
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {
    **cupy_columns.KERNELS,
    **cupy_conv.KERNELS,
    **cupy_linear.KERNELS,
}
