"""The benchmark's networks in PyTorch, for ``bench_peers.make``. float32, TF32 off.

Notation: N batch, C channels, H/W input.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from bench_nets import LEARNING_RATE, Peer, images
from bench_torch_nets import torch_net


def make(name: str, net: str, device: str) -> "Torch":
    """Return a peer: "torch" (eager mode), "torch-channels-last", "torch-compile" or "torch-graph"
    (a step replayed from a CUDA graph).

    Raises OSError for a graph on a device other than CUDA, and for ``torch.compile`` on a CPU
    without a C++ compiler.
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
        if device == "cpu" and not compiler():
            raise OSError("torch.compile needs a C++ compiler (g++, clang++ or $CXX)")
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


def compiler() -> str | None:
    """Return the C++ compiler that ``torch.compile`` would use on a CPU, or None."""
    for name in (os.environ.get("CXX", ""), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def export(net: str, size: int | None, path: Path) -> None:
    """Write the net as PyTorch exports it for inference: batch norms are folded into the
    convolutions before them. The number of images is free.
    """
    import torch

    twin = torch_net(net).eval()
    example = torch.from_numpy(images(net, 2, size=size)[0])
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the other exporter needs onnxscript
        torch.onnx.export(
            twin,
            (example,),
            str(path),
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes={"input": {0: "N"}, "output": {0: "N"}},
        )
