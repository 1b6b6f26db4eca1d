"""The PyTorch adapter: CPU, CUDA, Apple's and Intel's GPUs; convolution and pooling use PyTorch's
kernels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from portacnn.errors import BackendError
from portacnn.runtime import Array, Backend, BackendInfo, HostArray

KINDS = frozenset({"cpu", "cuda", "mps", "xpu"})
REFUSED = {
    "MaskedTensor": "the mask would be lost; fill the masked values first: x.to_tensor(0), "
    "or another value"
}
_REMEDY = 'PyTorch is not installed: pip install "portacnn[torch]"'


class TorchBackend(Backend):
    """Tensors without autograd: portacnn has its own backward passes."""

    views_alias = True

    def asarray(self, host: HostArray, dtype: str | None = None) -> Array:
        import torch

        native = np.asarray(host).dtype.newbyteorder("=")
        # a copy, because host may be read-only
        source = torch.from_numpy(np.array(host, dtype=native, order="C"))
        return source.to(device=self.device, dtype=dtype and self.dtype(dtype))

    def share(self, host: HostArray) -> Array:
        import torch

        flags = host.flags
        ours = (
            flags.writeable
            and flags.aligned
            and host.dtype.isnative
            and all(n >= 0 for n in host.strides)
        )
        return torch.from_numpy(host) if self.device.type == "cpu" and ours else self.asarray(host)

    def to_host(self, array: Array) -> HostArray:
        return array.detach().to("cpu", copy=True).contiguous().numpy()

    def contiguous(self, array: Array) -> Array:
        return array.contiguous()

    def as_real(self, array: Array) -> Array:
        import torch

        return torch.view_as_real(array.resolve_conj())

    def as_complex(self, parts: Array) -> Array:
        import torch

        return torch.view_as_complex(parts.contiguous())

    def synchronize(self) -> None:
        import torch

        if self.device.type != "cpu":
            device = () if self.device.index is None else (self.device,)
            getattr(torch, self.device.type).synchronize(*device)

    def is_out_of_memory(self, error: BaseException) -> bool:
        import torch

        on_host = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        return on_host or isinstance(error, MemoryError | torch.OutOfMemoryError)

    def compile_step(
        self, step: Callable[..., Any], example: tuple[Any, ...]
    ) -> Callable[..., Any]:
        from portacnn.backends.torch.steps import WholeStep

        return WholeStep(self, step)


def probe() -> BackendInfo:
    try:
        import torch
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return BackendInfo(
            "torch",
            None,
            (),
            _REMEDY if missing else f"PyTorch is installed but does not load: {error}",
        )
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    if torch.xpu.is_available():
        devices.extend(f"xpu:{i}" for i in range(torch.xpu.device_count()))
    return BackendInfo("torch", torch.__version__, tuple(devices))


def connect(device: str | None) -> Backend:
    info = probe()
    if info.reason:
        raise BackendError(info.reason)
    import array_api_compat.torch as xp
    import torch

    from portacnn.backends.torch.kernels import KERNELS

    word = device or "cpu"
    word = f"{word}:0" if word in ("cuda", "xpu") else word
    if word not in info.devices:
        raise BackendError(
            f"expected one of PyTorch's devices {', '.join(info.devices)}, got {device!r}"
        )
    return TorchBackend(
        name="torch",
        xp=xp,
        device=torch.device(word),
        layout="batch_first",
        kernels={"native": KERNELS},
    )
