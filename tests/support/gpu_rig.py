"""scripts/gpu_check.py on NumPy in place of a GPU: what its tests share."""

import ast
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from portacnn.runtime import resolve

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))
check, tools, kernels, times, training, parity, plan, suite, ranks = (
    import_module(name)
    for name in (
        *(
            "gpu_check",
            "gpu.tools",
            "gpu.kernels",
            "gpu.times",
            "gpu.training",
            "gpu.parity",
        ),
        *("gpu.plan", "gpu.suite", "gpu.ranks"),
    )
)
NUMPY = resolve("numpy")


class HostGpu(tools.Gpu):
    """NumPy in place of the GPU, which captures nothing and whose memory grows by so many bytes
    between two looks."""

    grows = 0

    def __init__(self, device: str) -> None:
        class Stream:
            def end_capture(self) -> None: ...

        class ndarray(np.ndarray): ...  # noqa: N801

        runtime = SimpleNamespace(getDeviceCount=lambda: 1)
        made = {
            "array": np.array,
            "asarray": np.asarray,
            "ascontiguousarray": np.ascontiguousarray,
            "full": np.full,
        }
        self.cp = SimpleNamespace(
            cuda=SimpleNamespace(Stream=Stream, runtime=runtime), ndarray=ndarray, **made
        )
        self.home = NUMPY
        self.looks = 0

    def forget(self) -> None: ...

    def memory(self) -> dict[str, int]:
        self.looks += 1
        return {"used": self.looks * self.grows, "held": 1 << 20, "free": 1 << 30}


def run(name: str, **options: Any) -> dict[str, Any]:
    return tools.Section(name, seconds=100.0, quick=True, **options).run(
        check.names_of_parts()[name]
    )


def numpy_for_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a test: the sections find NumPy where they look for a GPU."""
    for module in (training, parity):
        monkeypatch.setattr(module, "Gpu", HostGpu)
    monkeypatch.setattr(HostGpu, "grows", 0)


def plan_table(text: str) -> dict[str, dict[str, float]]:
    (found,) = (
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "YIELDS"
    )
    return ast.literal_eval(found)
