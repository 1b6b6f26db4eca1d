"""CUDA graphs of PyTorch on the CPU: what is recorded is not executed, and a replay does it on the
same memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from portacnn.backends.torch import steps

COMPILE = torch.compile


def traced(module: Any, **options: Any) -> Any:
    """In place of torch.compile: the traced operations as they are."""
    return module


class Tape(TorchDispatchMode):
    """Records operations as a CUDA graph does: what writes to memory that is there is not done,
    and a value is not read on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if func._schema.is_mutable:
            self.calls.append((func, *tree_map(_alias, (args, kwargs)), None))
            return args[0]
        clones = func is torch.ops.aten.native_batch_norm.default  # it writes to running statistics
        found = func(*(tree_map(_clone, args) if clones else args), **kwargs)
        if not any(a.alias_info is not None for a in func._schema.arguments):  # no view
            self.calls.append((func, *tree_map(_alias, (args, kwargs, found))))
        return found


def _alias(value: Any) -> Any:
    """Another object for the same memory: a graph keeps memory, not objects."""
    return value.detach() if isinstance(value, torch.Tensor) else value


def _clone(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


class Graph:
    """torch.cuda.CUDAGraph"""

    made: ClassVar[list["Graph"]] = []

    def __init__(self) -> None:
        self.tape = Tape()
        self.replayed = 0
        Graph.made.append(self)

    def replay(self) -> None:
        self.replayed += 1
        for func, args, kwargs, found in self.tape.calls:
            fresh = func(*args, **kwargs)
            outputs = found if isinstance(found, tuple | list) else [found]
            results = fresh if isinstance(fresh, tuple | list) else [fresh]
            for there, result in zip(outputs, results, strict=True):
                if there is not None:
                    there.copy_(result)


@contextmanager
def capture(graph: Graph, *, pool: Any, capture_error_mode: str) -> Iterator[None]:
    """torch.cuda.graph"""
    assert (pool, capture_error_mode) == ("a pool", "thread_local")
    with graph.tape:
        yield


def install(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Let steps on the CPU be recorded as if it were a CUDA device. Returns the graphs made."""
    Graph.made.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "a pool")
    monkeypatch.setattr(steps, "_compiled", steps._graph)
    return Graph.made
