"""The benchmark's networks in PyTorch, for ``bench_peers.make``. float32, TF32 off.

Notation: N batch, C channels, H/W input.
"""

from typing import Any

import numpy as np
from bench_nets import LEARNING_RATE, PLAIN, Conv, Peer, Pool


def make(name: str, net: str, device: str) -> "Torch":
    """Return a peer: "torch" (eager mode), "torch-channels-last", "torch-compile" or "torch-graph"
    (a step replayed from a CUDA graph).

    Raises OSError for a graph on a device other than CUDA.
    """
    if name == "torch-graph":
        return TorchGraph(net, device)
    if name == "torch-compile":
        return TorchCompiled(net, device)
    return Torch(net, device, channels_last=name == "torch-channels-last")


class Torch(Peer):
    """PyTorch in eager mode."""

    def __init__(self, net: str, device: str, *, channels_last: bool = False) -> None:
        import torch

        # cuDNN enables TF32 by default
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self.torch, self.device = torch, torch.device(device)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = torch_net(net).to(self.device).to(memory_format=self.format)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LEARNING_RATE)
        self.loss = torch.nn.CrossEntropyLoss()
        self.parameters = sum(p.numel() for p in self.net.parameters())

    @staticmethod
    def load() -> None:
        """Import everything that a first training step imports; the optimizer imports more than
        ``import torch``.
        """
        import torch

        torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE).zero_grad()

    def put(self, array: np.ndarray) -> Any:
        tensor = self.torch.from_numpy(array).to(self.device)
        return tensor.contiguous(memory_format=self.format) if tensor.ndim == 4 else tensor

    def begin(self, training: bool) -> None:
        self.net.train(training)

    def step(self, x: Any, t: Any) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.net(x), t)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def predict(self, x: Any) -> Any:
        with self.torch.inference_mode():
            return self.net(x)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def device_bytes(self) -> int | None:
        return (
            self.torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else None
        )


class TorchCompiled(Torch):
    """The network through ``torch.compile``, for one shape; loss and optimizer as in eager mode."""

    def __init__(self, net: str, device: str) -> None:
        super().__init__(net, device)
        self.net = self.torch.compile(self.net, dynamic=False)


class TorchGraph(Torch):
    """A whole training step as a CUDA graph, recorded at the first step and for every new shape."""

    def __init__(self, net: str, device: str) -> None:
        if not device.startswith("cuda"):
            raise OSError(f"a CUDA graph needs a CUDA device, got {device}")
        super().__init__(net, device)
        self.graph: Any = None
        self.x: Any = None

    def step(self, x: Any, t: Any) -> Any:
        if self.graph is None or self.x.shape != x.shape:
            self._record(x, t)
        elif self.x is not x:
            self.x.copy_(x)
            self.t.copy_(t)
        self.graph.replay()
        return self.last

    def _record(self, x: Any, t: Any) -> None:
        cuda = self.torch.cuda
        side = cuda.Stream(self.device)
        side.wait_stream(cuda.current_stream(self.device))
        with cuda.stream(side):  # allocations and algorithms are chosen before the recording
            for _ in range(3):
                super().step(x, t)
        cuda.current_stream(self.device).wait_stream(side)
        self.x, self.t, self.graph = x, t, cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with cuda.graph(self.graph):
            self.last = super().step(x, t)


def torch_net(net: str) -> Any:
    """Return the network as a ``torch.nn.Module``."""
    from torch import nn

    if net == "resnet20":
        return _torch_resnet20()
    if net == "alexnet":
        return _torch_alexnet()
    layers: list[Any] = []
    for layer in PLAIN[net]:
        if isinstance(layer, Conv):
            layers += [
                nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, padding=layer.padding),
                nn.ReLU(),
            ]
        elif isinstance(layer, Pool):
            layers.append(nn.MaxPool2d(2))
        else:
            # a second Flatten returns its input
            layers += [nn.Flatten(), nn.Linear(*layer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _torch_resnet20() -> Any:
    """He et al., 2015, section 4.2. A block that changes the shape takes every second pixel and
    pads channels with zeros (option A).
    """
    from torch import nn

    def conv(inputs: int, outputs: int, stride: int) -> Any:
        return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                *(conv(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU()),
                *(conv(outputs, outputs, 1), nn.BatchNorm2d(outputs)),
            )
            self.relu = nn.ReLU()
            self.stride, self.more = stride, outputs - inputs

        def forward(self, x: Any) -> Any:
            short = x
            if self.stride != 1 or self.more:
                pads = (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)
                short = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], pads)
            return self.relu(self.body(x) + short)

    widths = [16] * 3 + [32] * 3 + [64] * 3
    strides = [1, 1, 1, 2, 1, 1, 2, 1, 1]
    blocks = [Block(a, b, s) for a, b, s in zip([16, *widths[:-1]], widths, strides, strict=True)]
    first = (conv(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _torch_alexnet() -> Any:
    """Krizhevsky et al., 2012, with the paper's two groups and its response norm."""
    from torch import nn

    def norm() -> Any:
        return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)

    return nn.Sequential(
        *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, padding=2, groups=2), nn.ReLU(), norm(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(384, 384, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(9216, 4096), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4096, 1000)),
    )
