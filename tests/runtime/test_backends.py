"""The registry of backends, and arrays: whose they are, there and back."""

import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import portacnn.backends
from portacnn import available_backends, resolve, runtime
from portacnn.errors import ArrayError, BackendError
from portacnn.runtime import Backend, BackendInfo, backend_of, describe
from support.resolving import NUMPY, told


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


# --- the registry ---------------------------------------------------------------------------------


def test_available_backends_lists_the_built_in_ones():
    infos = available_backends()
    assert [info.name for info in infos] == ["numpy", "cupy", "torch", "array_api_strict", "jax"]
    for info in infos:
        assert (info.reason is None) == bool(info.devices)
        for device in info.devices:
            assert resolve(device, info.name).name == info.name
    compiler = f" with numba {version('numba')}" if find_spec("numba") else ""
    assert str(infos[0]) == f"numpy {np.__version__}{compiler}: cpu"


class Alien:
    """An array of a library that nobody knows."""

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
        BackendError,
        match="expected one of numpy, cupy, torch, array_api_strict, jax, alienlib, auto",
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
    # CuPy's and PyTorch's are looked at in tests/backends
    assert again.name in ("cupy", "torch") or again.compile_step(step, ()) is step
    with pytest.raises(AttributeError):
        again.name = "other"


def test_importing_the_folder_itself_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(Path(portacnn.backends.__file__).parents[1])
    monkeypatch.delitem(sys.modules, "backends", raising=False)
    with pytest.raises(ImportError, match=r"write `import portacnn\.backends`"):
        __import__("backends")
