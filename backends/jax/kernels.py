"""The kernels of the JAX backend: the tables of the modules, joined."""

from portacnn.runtime import Kernel

KERNELS: dict[str, Kernel] = {}
