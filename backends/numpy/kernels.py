"""NumPy's native kernel set: the tables of the modules, joined."""

from portacnn.backends.numpy import (
    batch,
    clip,
    conv,
    conv_transpose,
    dropout,
    grouped,
    join,
    linear,
    norm,
    pool,
    special,
    updates,
)
from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {
    **batch.KERNELS,
    **clip.KERNELS,
    **conv.KERNELS,
    **conv_transpose.KERNELS,
    **grouped.KERNELS,
    **dropout.KERNELS,
    **join.KERNELS,
    **linear.KERNELS,
    **norm.KERNELS,
    **pool.KERNELS,
    **special.KERNELS,
    **updates.KERNELS,
}
