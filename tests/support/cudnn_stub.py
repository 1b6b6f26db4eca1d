"""A stand-in for the package ``cudnn`` (nvidia-cudnn-frontend), for tests alone: the calls that
convolution makes.

A graph computes on the host memory behind the integers it is given, by the dims and strides it was
told. Calls out of order, unknown names, and shapes that don't belong together raise.
"""

import ctypes
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np


class cudnnGraphNotSupportedError(Exception):  # noqa: N801
    """By cuDNN's own name."""


class Tensor:
    def __init__(self, dim: list[int], stride: list[int], data_type: str | None, name: str) -> None:
        self.dim, self.stride, self.data_type, self.name = dim, stride, data_type, name
        self.uid: int | None = None
        self.output = False

    def set_uid(self, uid: int) -> "Tensor":
        self.uid = uid
        return self

    def set_output(self, value: bool) -> "Tensor":
        self.output = value
        return self

    def set_dim(self, dim: list[int]) -> "Tensor":
        self.dim = dim
        return self

    def set_stride(self, stride: list[int]) -> "Tensor":
        self.stride = stride
        return self

    def set_data_type(self, data_type: str) -> "Tensor":
        self.data_type = data_type
        return self

    def at(self, pointer: int) -> np.ndarray:
        """What lies there, as an array of these dims and strides."""
        assert type(pointer) is int  # cuDNN takes no other integers
        assert pointer % 16 == 0, (
            "not where the tensor was said to lie: 16 bytes are what cuDNN takes for granted"
        )
        dtype = np.dtype({"FLOAT": "float32", "DOUBLE": "float64"}[str(self.data_type)])
        count = 1 + sum((d - 1) * s for d, s in zip(self.dim, self.stride, strict=True))
        memory = (ctypes.c_char * (count * dtype.itemsize)).from_address(pointer)
        strides = [s * dtype.itemsize for s in self.stride]
        return np.ndarray(self.dim, dtype, memory, strides=strides)


class Graph:
    """``cudnn.pygraph``: one convolution."""

    STEPS = (
        "validate",
        "build_operation_graph",
        "create_execution_plans",
        "check_support",
        "build_plans",
    )

    def __init__(self, stub: "Stub", **given: Any) -> None:
        assert given.keys() == {
            "io_data_type",
            "intermediate_data_type",
            "compute_data_type",
            "handle",
        }
        self.stub, self.given = stub, given
        self.inputs: dict[str, Tensor] = {}
        self.kind = ""
        self.attributes: dict[str, Any] = {}
        self.result = Tensor([], [], None, "")
        self.done: list[str] = []
        self.notes: set[str] = set()
        self.limit: int | None = None

    def tensor(self, *, name: str, dim: list[int], stride: list[int], data_type: str) -> Tensor:
        return Tensor(dim, stride, data_type, name)

    def _conv(self, kind: str, attributes: dict[str, Any], **inputs: Tensor) -> Tensor:
        known = {"pre_padding", "post_padding", "stride", "dilation", "compute_data_type"}
        assert attributes.keys() == known
        assert all(
            type(n) is int for name in known - {"compute_data_type"} for n in attributes[name]
        )
        self.kind, self.attributes, self.inputs = kind, attributes, inputs
        return self.result

    def conv_fprop(self, *, image: Tensor, weight: Tensor, **attributes: Any) -> Tensor:
        return self._conv("fprop", attributes, image=image, weight=weight)

    def conv_dgrad(self, *, loss: Tensor, filter: Tensor, **attributes: Any) -> Tensor:
        return self._conv("dgrad", attributes, loss=loss, filter=filter)

    def conv_wgrad(self, *, image: Tensor, loss: Tensor, **attributes: Any) -> Tensor:
        return self._conv("wgrad", attributes, image=image, loss=loss)

    def _step(self, name: str) -> None:
        assert name == self.STEPS[len(self.done)], f"{name} after {self.done}"
        self.done.append(name)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, filter and loss."""
        named = {
            **self.inputs,
            {"fprop": "loss", "dgrad": "image", "wgrad": "filter"}[self.kind]: self.result,
        }
        return named["image"], named.get("weight") or named["filter"], named["loss"]

    def validate(self) -> None:
        self._step("validate")
        tensors = (*self.inputs.values(), self.result)
        assert self.result.output
        assert None not in {t.uid for t in tensors}
        assert len({t.uid for t in tensors}) == len(tensors)
        image, kernels, loss = self.parts
        assert image.dim[0] == loss.dim[0]
        assert kernels.dim[0] == loss.dim[1]
        assert image.dim[1] % kernels.dim[1] == 0
        a = self.attributes
        for i in (0, 1):
            room = image.dim[2 + i] + a["pre_padding"][i] + a["post_padding"][i]
            reach = (kernels.dim[2 + i] - 1) * a["dilation"][i] + 1
            assert loss.dim[2 + i] == (room - reach) // a["stride"][i] + 1

    def build_operation_graph(self) -> None:
        self._step("build_operation_graph")

    def create_execution_plans(self, modes: list[str]) -> None:
        self._step("create_execution_plans")
        assert modes
        self.stub.built.append(self)
        if self.kind in self.stub.refused:
            raise cudnnGraphNotSupportedError("no valid engine configs")

    def deselect_numeric_notes(self, notes: list[str]) -> None:
        # before there are plans, cuDNN's own marks nothing
        if "create_execution_plans" in self.done:
            self.notes.update(notes)

    def deselect_workspace_greater_than(self, limit: int) -> None:
        self.limit = limit

    def check_support(self) -> None:
        self._step("check_support")

    def build_plans(self) -> None:
        self._step("build_plans")

    def get_workspace_size(self) -> int:
        return self.stub.workspace

    def execute(self, pointers: dict[int, int], workspace: int, *, handle: Any) -> None:
        assert self.done == list(self.STEPS)
        assert type(workspace) is int
        assert handle is self.given["handle"]
        self.stub.executed.append((self.kind, handle.device, handle.stream))
        ctypes.memset(workspace, 0xAB, self.stub.workspace)
        image, kernels, loss = (t.at(pointers[t.uid]) for t in self.parts)  # type: ignore[index]
        result = {"fprop": loss, "dgrad": image, "wgrad": kernels}[self.kind]
        self._compute(
            *(
                np.zeros(a.shape) if a is result else a.astype("float64")
                for a in (image, kernels, loss)
            ),
            result,
        )

    def _compute(self, x: np.ndarray, w: np.ndarray, y: np.ndarray, result: np.ndarray) -> None:
        """One number of the result after another would be too slow: one tap after another, of one
        output channel."""
        a = self.attributes
        pads = [(0, 0), (0, 0), *zip(a["pre_padding"], a["post_padding"], strict=True)]
        x = np.pad(x, pads)
        each = w.shape[0] // (x.shape[1] // w.shape[1])
        for o, i, j in product(range(w.shape[0]), range(w.shape[2]), range(w.shape[3])):
            first = o // each * w.shape[1]
            rows, columns = (
                slice(k * d, k * d + (n - 1) * s + 1, s)
                for k, d, n, s in zip((i, j), a["dilation"], y.shape[2:], a["stride"], strict=True)
            )
            seen = x[:, first : first + w.shape[1], rows, columns]
            if self.kind == "fprop":
                y[:, o] += (seen * w[o, :, i, j, None, None]).sum(1)
            elif self.kind == "wgrad":
                w[o, :, i, j] = (seen * y[:, o, None]).sum((0, 2, 3))
            else:
                seen += w[o, :, i, j, None, None] * y[:, o, None]
        (top, bottom), (left, right) = pads[2:]
        inside = x[:, :, top : x.shape[2] - bottom, left : x.shape[3] - right]
        result[...] = {"fprop": y, "dgrad": inside, "wgrad": w}[self.kind]


class Stub(ModuleType):
    """The module. ``refused`` are operations that no plan is found for."""

    def __init__(self) -> None:
        super().__init__("cudnn")
        self.built: list[Graph] = []
        # operation, the handle's device, its stream
        self.executed: list[tuple[str, int, int | None]] = []
        self.handles: list[SimpleNamespace] = []
        self.refused: set[str] = set()
        self.workspace = 100
        self.device = 0
        self.cudnnGraphNotSupportedError = cudnnGraphNotSupportedError
        self.data_type = SimpleNamespace(FLOAT="FLOAT", DOUBLE="DOUBLE")
        self.heur_mode = SimpleNamespace(A="A", FALLBACK="FALLBACK")
        names = (
            "TENSOR_CORE DOWN_CONVERT_INPUTS REDUCED_PRECISION_REDUCTION FFT NONDETERMINISTIC "
            "WINOGRAD"
        )
        tiles = "WINOGRAD_TILE_4x4 WINOGRAD_TILE_6x6 WINOGRAD_TILE_13x13 STRICT_NAN_PROP"
        self.numerical_note = SimpleNamespace(**{name: name for name in f"{names} {tiles}".split()})

    def pygraph(self, **given: Any) -> Graph:
        return Graph(self, **given)

    def create_handle(self) -> SimpleNamespace:
        self.handles.append(SimpleNamespace(device=self.device, stream=None))
        return self.handles[-1]

    def set_stream(self, *, handle: SimpleNamespace, stream: int) -> None:
        assert type(stream) is int
        handle.stream = stream
