"""The ops that numba compiles for NumPy's arrays: the table. Asked before NumPy's own, where numba is installed."""

from portacnn.backends.numba.conv import (
    conv,
    conv_backward,
    conv_relu,
    conv_relu_backward,
    prepare_conv,
    prepare_conv_relu,
)
from portacnn.backends.numba.norm import KERNELS as NORM_KERNELS
from portacnn.runtime import Kernel

KERNELS = {
    **NORM_KERNELS,
    "conv": Kernel(conv, conv_backward, prepare_conv),
    "conv_relu": Kernel(conv_relu, conv_relu_backward, prepare_conv_relu),
}
