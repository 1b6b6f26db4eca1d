"""The adapter of ``toyarray``, the example of docs/backends.md."""

import numpy as np
import toyarray

from portacnn.errors import BackendError
from portacnn.runtime import Backend, BackendInfo, Kernel

KINDS = frozenset({"toy"})  # the kinds of device


class ToyBackend(Backend):
    """toyarray on its device."""

    views_alias = True  # a slice is a view of the array's memory
    enters = True  # see active and elsewhere

    def to_host(self, array):
        return array.fetch()

    def active(self):
        return np.errstate(all="ignore")  # a division by 0 is no warning

    def elsewhere(self, device):
        return self.active()


def relu(x, *, keep=True):
    y = toyarray.maximum(x, toyarray.asarray(0.0, dtype=x.dtype))
    return y, y if keep else None


def relu_backward(dy, y):
    return dy * toyarray.astype(y > 0, dy.dtype)


KERNELS = {"relu": Kernel(relu, relu_backward)}


def probe():
    return BackendInfo("toyarray", toyarray.__version__, ("toy:0",))


def connect(device):
    if device not in (None, "toy", "toy:0"):
        raise BackendError(f"toyarray has the device toy:0, got {device!r}")
    return ToyBackend(
        name="toyarray",
        xp=toyarray,
        device=toyarray.TOY,
        layout="batch_first",
        kernels={"native": KERNELS},
    )
