"""CuPy's devices and precisions, on a stub."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest

from portacnn import available_backends, resolve
from portacnn.errors import BackendError
from support.resolving import NUMPY, REMEDIES, told


@pytest.fixture
def stub_cupy(monkeypatch):
    """A CuPy that is installed and sees ``devices`` CUDA devices; None stands for a driver that
    does not answer."""

    class CUDARuntimeError(RuntimeError):
        pass

    def install(devices):
        def count():
            if devices is None:
                raise CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
            return devices

        cupy = ModuleType("cupy")
        cupy.__version__ = "14.0.0"
        cupy.cuda = SimpleNamespace(
            runtime=SimpleNamespace(getDeviceCount=count, CUDARuntimeError=CUDARuntimeError),
            Device=lambda index: SimpleNamespace(
                id=index, compute_capability=["90", "75"][index % 2]
            ),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        monkeypatch.setitem(
            sys.modules, "array_api_compat.cupy", ModuleType("array_api_compat.cupy")
        )

    return install


# --- words that cannot be served ------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cupy:cpu"])
def test_cupy_on_the_cpu_is_an_error(stub_cupy, device):
    stub_cupy(2)
    with pytest.raises(
        BackendError, match="CuPy supports CUDA devices, got 'cpu'; use cuda or cuda:N"
    ):
        resolve(device, "cupy")


# --- CuPy, played by a stub -----------------------------------------------------------------------


def test_cupy_without_a_device(stub_cupy):
    stub_cupy(None)
    for words in ("cupy", "cuda", "cuda:1"):
        with pytest.raises(
            BackendError,
            match=r"^CuPy is installed but no CUDA device responds: "
            r"cudaErrorNoDevice",
        ):
            resolve(words)
    info = {info.name: info for info in available_backends()}["cupy"]
    assert info.version == "14.0.0"
    assert "no CUDA device responds" in str(info)
    stub_cupy(0)
    with pytest.raises(BackendError, match="CuPy is installed but there is no CUDA device"):
        resolve("cupy")


@pytest.mark.parametrize(
    ("arguments", "index"),
    [
        (("cupy",), 0),
        (("cuda",), 0),
        (("cuda:1",), 1),
        (("cupy:1",), 1),
        (("cupy:cuda:1",), 1),
        (("cuda:1", "cupy"), 1),
        (("1", "cupy"), 1),
        (("auto",), 0),
        ((None, "auto"), 0),
    ],
)
def test_cupys_devices(stub_cupy, arguments, index):
    stub_cupy(2)
    found = resolve(*arguments)
    assert (found.name, found.device.id, str(found)) == ("cupy", index, f"cupy on cuda:{index}")


def test_cupy_device_that_is_not_there(stub_cupy, variable):
    stub_cupy(2)
    with pytest.raises(BackendError, match=r"one of CuPy's devices cuda:0, cuda:1, got cuda:2$"):
        resolve("cuda:2")
    variable("cupy:1")
    assert resolve().device.id == 1
    assert resolve("cuda").device.id == 0
    with pytest.raises(BackendError, match=r"got cuda:7.*\(from PORTACNN_BACKEND=cupy:1\)"):
        resolve("cuda:7")


def test_the_same_device_said_twice_is_no_contradiction(stub_cupy):
    stub_cupy(2)
    assert resolve("cuda:1", "cupy:1").device.id == 1


# --- auto -----------------------------------------------------------------------------------------


def test_auto_says_what_it_chose(absent, stub_cupy, variable, caplog):
    absent("cupy")
    with caplog.at_level(logging.WARNING, logger="portacnn"):
        assert told(resolve("auto")) == NUMPY
    assert caplog.messages == [f"auto chose numpy on cpu (cupy: not usable: {REMEDIES['cupy']})"]
    caplog.clear()
    stub_cupy(1)
    variable("auto")
    with caplog.at_level(logging.WARNING, logger="portacnn"):
        assert resolve().name == "cupy"
    assert caplog.messages == ["auto chose cupy on cuda:0"]


# --- arrays ---------------------------------------------------------------------------------------


def test_precisions_are_those_of_the_device(stub_cupy):
    """Tensor cores take TF32 and bfloat16 from compute capability 8.0 on."""
    stub_cupy(2)
    assert resolve("cuda:0").precisions == ("float32", "tf32", "bfloat16", "float16", "3xtf32")
    assert resolve("cuda:1").precisions == ("float32",)
    assert resolve("numpy").precisions == ("float32",)
