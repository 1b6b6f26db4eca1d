"""``resolve``: from the words for a device, and the variable, to a backend; and what is refused."""

import logging
import sys

import numpy as np
import pytest

from portacnn import available_backends, resolve
from portacnn.errors import BackendError, PortacnnError
from support.matrix import needs
from support.resolving import NUMPY, REMEDIES, TORCH, told

STRICT = "array_api_strict"


# --- words that can be served ---------------------------------------------------------------------


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
            "array_api_strict, jax, auto",
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


@pytest.mark.parametrize("thing", [0, 1, 0.5, b"cpu", ["cpu"], np.dtype("float32")])
def test_words_must_be_text(thing):
    with pytest.raises(BackendError, match=r"device must be text such as cpu, .*got .*\("):
        resolve(thing)
    with pytest.raises(BackendError, match="backend must be text"):
        resolve(backend=thing)


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


# --- auto -----------------------------------------------------------------------------------------


def test_nothing_but_auto_logs(caplog, backend):
    with caplog.at_level(logging.DEBUG, logger="portacnn"):
        resolve()
        resolve(backend.backend.name)
    assert not caplog.messages
