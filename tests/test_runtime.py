"""From words to a backend, and from arrays to a backend: grammar, precedence, remedies."""

import logging
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import portacnn.backends
from portacnn import available_backends, resolve, runtime
from portacnn.errors import ArrayError, BackendError, PortacnnError
from portacnn.runtime import Backend, BackendInfo, backend_of, describe
from support.matrix import needs

REMEDIES = {
    "cupy": 'CuPy is not installed: pip install "portacnn[cuda13]" (or "portacnn[cuda12]", to fit '
    "the driver)",
    "torch": 'PyTorch is not installed: pip install "portacnn[torch]"',
    "array_api_strict": "array-api-strict is not installed: pip install array-api-strict",
}


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


@pytest.fixture
def variable(monkeypatch):
    return lambda value: monkeypatch.setenv("PORTACNN_BACKEND", value)


@pytest.fixture
def absent(monkeypatch):
    """Make libraries look uninstalled."""
    return lambda *names: [monkeypatch.setitem(sys.modules, name, None) for name in names]


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


@pytest.fixture
def foreign(monkeypatch):
    """Add an adapter as another package's entry point would."""

    def add(name, adapter):
        def load():
            if isinstance(adapter, Exception):
                raise adapter
            return adapter

        monkeypatch.setattr(
            runtime, "_foreign", lambda: {name: SimpleNamespace(name=name, load=load)}
        )
        monkeypatch.setattr(runtime, "_by_type", {})
        runtime._adapter.cache_clear()

    yield add
    runtime._adapter.cache_clear()


def told(backend):
    return backend.name, str(backend.device)


# --- words that can be served ---------------------------------------------------------------------

NUMPY, TORCH = ("numpy", "cpu"), ("torch", "cpu")
STRICT = "array_api_strict"


@pytest.mark.parametrize(
    ("device", "backend", "expected"),
    [
        (None, None, NUMPY),
        ("", None, NUMPY),
        (" ", None, NUMPY),
        ("cpu", None, NUMPY),
        (" numpy ", None, NUMPY),
        ("numpy:cpu", None, NUMPY),
        (None, "numpy", NUMPY),
        ("cpu", "numpy", NUMPY),
        ("numpy", "numpy", NUMPY),
        ("numpy:cpu", "numpy", NUMPY),
        pytest.param("torch", None, TORCH, marks=needs("torch")),
        pytest.param("torch:cpu", None, TORCH, marks=needs("torch")),
        pytest.param(None, "torch", TORCH, marks=needs("torch")),
        pytest.param("cpu", "torch", TORCH, marks=needs("torch")),
        pytest.param("cpu", "torch:cpu", TORCH, marks=needs("torch")),
        pytest.param("torch", "torch:cpu", TORCH, marks=needs("torch")),
    ],
)
def test_arguments_name_a_backend(device, backend, expected):
    assert told(resolve(device, backend)) == expected


@pytest.mark.parametrize(
    ("device", "backend", "word"),
    [
        ("array_api_strict:device1", None, "device1"),
        ("device1", STRICT, "device1"),
        (None, f"{STRICT}:device1", "device1"),
        (STRICT, None, "CPU_DEVICE"),
        ("cpu", STRICT, "CPU_DEVICE"),
    ],
)
def test_devices_are_the_librarys_own(device, backend, word):
    xp = pytest.importorskip("array_api_strict")
    found = resolve(device, backend)
    assert (found.name, found.device) == (STRICT, xp.Device(word))


def test_a_backend_is_handed_back():
    numpy = resolve("numpy")
    assert resolve(numpy) is numpy
    assert resolve(numpy, "numpy") is numpy
    with pytest.raises(BackendError, match="backend='torch' contradicts device=numpy on cpu"):
        resolve(numpy, "torch")


# --- the variable ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [STRICT, f" {STRICT} ", f"{STRICT}:cpu"])
def test_variable_applies_when_nothing_else_is_said(variable, value):
    pytest.importorskip(STRICT)
    variable(value)
    assert resolve().name == STRICT
    assert resolve("cpu").name == STRICT  # a plain device is the variable's where that can serve it
    assert resolve("numpy").name == "numpy"
    assert resolve(backend="numpy").name == "numpy"


def test_variable_is_read_at_each_call(variable):
    pytest.importorskip(STRICT)
    variable(f"{STRICT}:device1")
    assert "device1" in str(resolve().device)
    assert "CPU" in str(resolve("cpu").device)  # the argument's device, the variable's library
    variable("")
    assert told(resolve()) == NUMPY
    variable("cpu")
    assert told(resolve()) == NUMPY


@pytest.mark.parametrize("value", ["cupy", "cupy:1", "cuda", "cuda:1", "auto"])
def test_cpu_under_a_variable_that_wants_cuda_is_numpy(variable, value):
    variable(value)
    assert told(resolve("cpu")) == NUMPY


@needs("torch")
def test_cuda_is_the_librarys_that_the_variable_names(variable):
    variable("torch")
    with pytest.raises(
        BackendError,
        match=r"PyTorch's devices .*'cuda:77' \(from "
        r"PORTACNN_BACKEND=torch\)",
    ):
        resolve("cuda:77")
    with pytest.raises(BackendError, match=r"PyTorch's devices .*'tpu'"):
        resolve("tpu")
    assert told(resolve("cpu")) == TORCH


@pytest.mark.parametrize(
    ("value", "device"), [(None, "cuda"), (None, "cuda:1"), ("numpy", "cuda:1"), ("cuda", None)]
)
def test_cuda_is_cupys_otherwise(variable, absent, value, device):
    absent("cupy")
    if value:
        variable(value)
    with pytest.raises(BackendError) as caught:
        resolve(device)
    assert str(caught.value) == REMEDIES["cupy"] + (
        " (from PORTACNN_BACKEND=cuda)" if value == "cuda" else ""
    )


@needs("torch")
def test_cuda_with_torch_named_is_torchs():
    for arguments in (("cuda:77", "torch"), ("torch:cuda:77",), (None, "torch:cuda:77")):
        with pytest.raises(BackendError, match=r"one of PyTorch's devices cpu.*got 'cuda:77'"):
            resolve(*arguments)


@pytest.mark.parametrize("value", ["nonsense", "tpu:0", "Numpy", "torch,cupy"])
def test_a_variable_without_meaning_is_an_error(variable, value):
    variable(value)
    for device in (None, "cpu"):
        with pytest.raises(
            BackendError,
            match=f"PORTACNN_BACKEND='{value}' is not a backend or device; expected one of cpu",
        ):
            resolve(device)
    assert told(resolve("numpy")) == NUMPY  # whoever names a backend does not ask the variable


def test_the_variable_is_named_where_it_is_to_blame(variable, absent):
    absent("torch")
    variable("torch")
    with pytest.raises(BackendError) as caught:
        resolve()
    assert str(caught.value) == f"{REMEDIES['torch']} (from PORTACNN_BACKEND=torch)"


# --- words that cannot be served ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "backend", "message"),
    [
        (
            "tensorflow",
            None,
            "unknown device 'tensorflow'; expected one of cpu, cuda, cuda:1, numpy, cupy",
        ),
        ("mps", None, "unknown device 'mps'; expected one of .*torch:mps"),
        ("NUMPY", None, "unknown device 'NUMPY'"),
        (
            None,
            "tensorflow",
            "unknown backend 'tensorflow'; expected one of numpy, cupy, torch, "
            "array_api_strict, auto",
        ),
        (None, "cuda", "unknown backend 'cuda'"),
        (
            "numpy:cuda",
            None,
            "NumPy supports the CPU only, got device 'cuda'; for a GPU use cuda or torch:cuda",
        ),
        ("cuda", "numpy", "NumPy supports the CPU only"),
        ("cpu:0", None, "NumPy supports the CPU only, got device 'cpu:0'"),
        ("cupy", "torch", "backend='torch' contradicts device='cupy'; pass one of the two"),
        ("cpu", "torch:cuda:0", "contradicts device='cpu'"),
        ("numpy", "auto", "contradicts"),
        ("auto:cuda", None, "auto accepts no device, got 'auto:cuda'; name the backend instead"),
        ("cpu", "auto", "auto accepts no device"),
        (
            f"{STRICT}:device9",
            None,
            r"an array_api_strict device \(cpu, device1.*\), got 'device9'",
        ),
    ],
)
def test_what_cannot_be_had_says_why(device, backend, message):
    if STRICT in str(device):
        pytest.importorskip(STRICT)
    with pytest.raises(BackendError, match=message) as caught:
        resolve(device, backend)
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, PortacnnError)


@pytest.mark.parametrize("thing", [0, 1, 0.5, b"cpu", ["cpu"], np, np.dtype("float32")])
def test_words_must_be_text(thing):
    with pytest.raises(BackendError, match=r"device must be text such as cpu, .*got .*\("):
        resolve(thing)
    with pytest.raises(BackendError, match="backend must be text"):
        resolve(backend=thing)


@pytest.mark.parametrize("device", ["cpu", "cupy:cpu"])
def test_cupy_on_the_cpu_is_an_error(stub_cupy, device):
    stub_cupy(2)
    with pytest.raises(
        BackendError, match="CuPy supports CUDA devices, got 'cpu'; use cuda or cuda:N"
    ):
        resolve(device, "cupy")


@pytest.mark.parametrize("name", REMEDIES)
def test_a_missing_library_names_the_remedy(absent, name):
    absent(name)
    for arguments in ((name,), (None, name)):
        with pytest.raises(BackendError) as caught:
            resolve(*arguments)
        assert str(caught.value) == REMEDIES[name]
    info = {info.name: info for info in available_backends()}[name]
    assert (info.version, info.devices, info.reason) == (None, (), REMEDIES[name])
    assert str(info) == f"{name}: not usable: {REMEDIES[name]}"


@pytest.mark.parametrize(
    ("name", "words"), [("torch", "PyTorch is installed"), ("cupy", "CuPy is installed")]
)
def test_a_library_that_does_not_load_says_so(monkeypatch, tmp_path, name, words):
    (tmp_path / f"{name}.py").write_text(
        "raise ImportError('libnothing.so: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(BackendError, match=f"{words} but does not load: libnothing.so"):
        resolve(name)


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


def test_nothing_but_auto_logs(caplog, backend):
    with caplog.at_level(logging.DEBUG, logger="portacnn"):
        resolve()
        resolve(backend.backend.name)
    assert not caplog.messages


# --- the registry ---------------------------------------------------------------------------------


def test_available_backends_lists_the_built_in_ones():
    infos = available_backends()
    assert [info.name for info in infos] == ["numpy", "cupy", "torch", "array_api_strict"]
    for info in infos:
        assert (info.reason is None) == bool(info.devices)
        for device in info.devices:
            assert resolve(device, info.name).name == info.name
    compiler = f" with numba {version('numba')}" if find_spec("numba") else ""
    assert str(infos[0]) == f"numpy {np.__version__}{compiler}: cpu"


class Alien:
    """An array of a library that nobody knows, as JAX's are."""

    __module__ = "alienlib._core"
    shape, dtype, device = (2, 3), "float32", "alien:0"


def alien_adapter():
    made = Backend(name="alienlib", xp=np, device="alien:0")
    return SimpleNamespace(
        KINDS=frozenset({"alien"}),
        probe=lambda: BackendInfo("alienlib", "1.0", ("alien:0",)),
        connect=lambda device: made if device in (None, "alien:0") else pytest.fail(device),
    )


def test_another_packages_backend(foreign, variable):
    with pytest.raises(
        ArrayError,
        match=r"expected an array of numpy, .*; got "
        r"alienlib\._core\.Alien",
    ):
        backend_of(Alien())
    foreign("alienlib", alien_adapter())
    assert resolve("alienlib").name == resolve("alienlib:alien:0").name == "alienlib"
    assert resolve("alien:0", "alienlib").name == "alienlib"
    assert [info.name for info in available_backends()][-1] == "alienlib"
    assert backend_of(Alien()).name == "alienlib"
    assert describe(Alien()) == "2x3, alienlib float32 on alien:0"
    variable("alienlib")
    assert resolve().name == resolve("alien:0").name == "alienlib"
    with pytest.raises(
        BackendError, match="expected one of numpy, cupy, torch, array_api_strict, alienlib, auto"
    ):
        resolve(backend="nobody")


def test_nobody_replaces_a_built_in_backend(foreign):
    foreign("numpy", alien_adapter())
    assert told(resolve("numpy")) == NUMPY
    assert [info.name for info in available_backends()].count("numpy") == 1


def test_a_broken_plug_in_is_reported_not_raised(foreign):
    foreign("alienlib", ImportError("no module named alienlib"))
    info = available_backends()[-1]
    assert info.name == "alienlib"
    assert "no module named alienlib" in info.reason


# --- arrays ---------------------------------------------------------------------------------------


def test_backend_of_an_array(backend):
    assert backend_of(backend.array([1.0])).name == backend.backend.name

    class Mine(np.ndarray):
        pass

    assert backend_of(np.zeros(3).view(Mine)).name == "numpy"


@pytest.mark.parametrize("thing", [[1.0], (1.0,), 1, 1.0])
def test_python_values_are_no_arrays(thing):
    with pytest.raises(ArrayError, match=rf"got builtins\.{type(thing).__name__} \(numpy\.asarray"):
        backend_of(thing)
    assert describe(thing) == f"builtins.{type(thing).__name__}"


@pytest.mark.parametrize("thing", [None, "text", object()])
def test_other_things_are_no_arrays(thing):
    with pytest.raises(
        TypeError,
        match=r"expected an array of numpy, .*got "
        rf"builtins\.{type(thing).__name__}$",
    ):
        backend_of(thing)


def test_describe(backend):
    name, place = backend.backend.name, str(backend.backend).partition(" on ")[2]
    images = backend.array(np.zeros((100, 6, 14, 14)), "float32")
    assert describe(images) == f"100x6x14x14, {name} float32 on {place}"
    assert describe(backend.array(np.zeros(3, "int64"))) == f"3, {name} int64 on {place}"
    assert (
        describe(backend.xp.sum(backend.array([1.0])))
        == f"0-dimensional, {name} float64 on {place}"
    )


def test_a_backend_is_told_in_words_that_resolve_takes(backend):
    name, place = str(backend.backend).split(" on ")
    assert resolve(f"{name}:{place}") == resolve(place, name) == backend.backend


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool"])
def test_round_trips_share_no_memory(backend, dtype):
    host = np.arange(24).reshape(2, 3, 4).astype(dtype)
    for source in (host, host[:, ::2], host.T, np.flip(host, 1), np.asfortranarray(host)):
        before = source.copy()
        there = backend.backend.asarray(source)
        source[...] = 0
        back = backend.host(there)
        again = backend.host(there)
        assert (back.dtype, back.shape) == (before.dtype, before.shape)
        np.testing.assert_array_equal(back, before)
        back[...] = 1
        np.testing.assert_array_equal(backend.host(there), before)
        assert not np.shares_memory(back, again)
        source[...] = before


def test_asarray_converts(backend):
    there = backend.backend.asarray(np.array([1, 2, 3]), "float32")
    assert there.dtype == backend.backend.dtype("float32")
    assert there.device == backend.backend.device
    there = backend.backend.asarray(np.ones((0, 3)), "float64")
    assert tuple(there.shape) == (0, 3)


def test_asarray_takes_one_number(backend):
    assert tuple(backend.backend.asarray(np.asarray(3.0)).shape) == ()


def test_asarray_takes_read_only_memory(backend):
    host = np.arange(3.0)
    host.flags.writeable = False
    np.testing.assert_array_equal(backend.host(backend.backend.asarray(host)), host)


def test_contiguous(backend):
    x = backend.array(np.arange(6.0).reshape(2, 3))
    turned = backend.backend.contiguous(x.T)
    assert tuple(turned.shape) == (3, 2)
    np.testing.assert_array_equal(backend.host(turned), np.arange(6.0).reshape(2, 3).T)


def test_contiguous_keeps_the_rank(backend):
    assert tuple(backend.backend.contiguous(backend.array(np.asarray(3.0))).shape) == ()


def test_backends_are_values(backend):
    again = resolve(backend.device)
    assert again == backend.backend
    assert again.synchronize() is None
    step = object()
    # CuPy's is looked at in test_cupy_capture
    assert again.name == "cupy" or again.compile_step(step, ()) is step
    with pytest.raises(AttributeError):
        again.name = "other"


def test_importing_the_folder_itself_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(Path(portacnn.backends.__file__).parents[1])
    monkeypatch.delitem(sys.modules, "backends", raising=False)
    with pytest.raises(ImportError, match=r"write `import portacnn\.backends`"):
        __import__("backends")


def test_precisions_are_those_of_the_device(stub_cupy):
    """Tensor cores take TF32 and bfloat16 from compute capability 8.0 on."""
    stub_cupy(2)
    assert resolve("cuda:0").precisions == ("float32", "tf32", "bfloat16", "float16", "3xtf32")
    assert resolve("cuda:1").precisions == ("float32",)
    assert resolve("numpy").precisions == ("float32",)
