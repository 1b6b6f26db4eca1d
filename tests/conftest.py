"""One suite, run once for every backend that is here.

``backend`` is a fixture over NumPy, NumPy with read-only inputs, array-api-strict on its CPU and on
``device1``, torch, and CuPy and torch on CUDA where there is a GPU; the header of a run says why
any of them is left out. ``PORTACNN_TEST_BACKENDS=cupy,torch`` asks for some by name, and one that
is asked for and missing fails. ``device1`` stands in for a GPU: there, everything that would carry
a value to the host unasked raises. ``cupy-emulated``, only by name, is CuPy's backend with its own
kernels on a stand-in for CuPy (``support/fake_cupy``), where there is no GPU. ``jax`` is by name
only too: XLA compiles every op for every shape, which takes many minutes.
``PORTACNN_TEST_SECONDS=60`` skips what would begin later than that: for a GPU that is lent for
minutes.
"""

import gc
import os
import sys
import time
from pathlib import Path
from tempfile import gettempdir

_begun = time.monotonic()
# one worker a core already: BLAS reads this when NumPy is first imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that XLA has compiled are kept for the next run, small ones too: JAX reads this when it
# is first imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(gettempdir()) / "portacnn-xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from portacnn.errors import BackendError
from portacnn.runtime import Backend, resolve
from support import fake_cupy
from support.matrix import BACKENDS, BY_NAME_ONLY, NEEDS, Here, suits

pytest_plugins = ("pytester",)

# no limits of wall time, which passes while other programs run
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")


def _resolved(name: str) -> Backend | BackendError:
    try:
        return resolve(_known[name])
    except BackendError as error:
        return error


_asked = [name for name in os.environ.get("PORTACNN_TEST_BACKENDS", "").split(",") if name]
_known = {**BACKENDS, **BY_NAME_ONLY}
_unknown = set(_asked) - set(_known)
if _unknown:
    raise pytest.UsageError(
        f"PORTACNN_TEST_BACKENDS: unknown {', '.join(_unknown)}; known are {', '.join(_known)}"
    )
if "cupy-emulated" in _asked:
    if not isinstance(_refusal := _resolved("cupy"), BackendError):
        raise pytest.UsageError(
            f"PORTACNN_TEST_BACKENDS: CuPy itself works here ({_refusal}): ask for cupy"
        )
    fake_cupy.install()


# What would bring a value to the host behind the program's back. A GPU would do it, slowly; device1
# refuses.
TRAPPED = (
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
    "__complex__",
    "__array__",
    "__dlpack__",
)


def _trapped(name: str, original: Any, cpu: Any) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.device != cpu:
            raise AssertionError(
                f"unplanned transfer to the host: {name} of an array on {self.device}"
            )
        return original(self, *args, **kwargs)

    return method


class _Index(type):
    def __instancecheck__(cls, instance: object) -> bool:
        return hasattr(type(instance), "__index__")


def _quicker(patch: pytest.MonkeyPatch, module: Any) -> None:
    """Two checks of array-api-strict that take a quarter of its time, with the same results: a new
    array's dtype is looked for in a set, not in a tuple, and an index is no runtime protocol."""
    if hasattr(module, "_all_dtypes"):
        patch.setattr(module, "_all_dtypes", frozenset(module._all_dtypes))
    if hasattr(module, "SupportsIndex"):
        patch.setattr(module, "SupportsIndex", _Index("SupportsIndex", (), {}))


@pytest.fixture(scope="session", autouse=True)
def bytecode_of_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests start many processes. Where Python may write no bytecode beside the sources, each of
    them would compile portacnn again, a third of a second: those of one run share a folder."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.dont_write_bytecode and sys.pycache_prefix is None:
            folder = tmp_path_factory.getbasetemp()
            folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
            patch.setenv("PYTHONPYCACHEPREFIX", str(folder / "bytecode"))
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def steps_are_not_compiled() -> Iterator[None]:
    """PyTorch's compiler takes a minute for a step: the traced step runs as it is, but in the one
    test that is about the compiler (``backends/torch/test_steps.py``)."""
    if "torch" not in sys.modules:
        yield
        return
    from support import torch_graphs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_graphs.torch, "compile", torch_graphs.traced)
        yield


@pytest.fixture(scope="session", autouse=True)
def files_are_not_flushed() -> Iterator[None]:
    """No test can see whether a file has reached the disk, and to wait for it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    """The programs of one file's shapes are of no use to the next, and take gigabytes together."""
    yield
    if "jax" in _asked:
        import jax

        from portacnn.backends.jax import compiled

        compiled._ops.clear()
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def transfer_trap() -> Iterator[None]:
    """For the whole session: array-api-strict's device1 hands over values only through
    ``to_device``."""
    try:
        import array_api_strict
    except ImportError:
        yield
        return
    kind = type(array_api_strict.asarray(0.0))
    cpu = array_api_strict.Device("CPU_DEVICE")
    with pytest.MonkeyPatch.context() as patch:
        _quicker(patch, sys.modules[kind.__module__])
        for name in TRAPPED:
            patch.setattr(kind, name, _trapped(name, getattr(kind, name), cpu))
        array_api_strict.set_array_api_strict_flags(
            boolean_indexing=False, data_dependent_shapes=False
        )
        yield
        array_api_strict.reset_array_api_strict_flags()


_found = {name: _resolved(name) for name in _asked or BACKENDS}


_seconds = float(os.environ.get("PORTACNN_TEST_SECONDS") or "inf")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    if time.monotonic() - _begun > _seconds:
        pytest.skip(f"the {_seconds:g} seconds of PORTACNN_TEST_SECONDS are over")


_missing = {name: reason for name, check in NEEDS.items() if (reason := check())}
_NONE = "none"
# whole files and folders, which import it
_WHOLE = {
    "torch": [
        "backends/cupy/test_cudnn.py",
        "backends/torch",
        "layers/test_graph.py",
        "ops/test_grid.py",
    ],
    "jax": ["backends/jax"],
    "onnx": ["onnx"],
    "onnxruntime": ["onnx/test_export*.py"],
    "PIL": ["data/test_image_folder.py"],
}
collect_ignore_glob = [path for name in _missing for path in _WHOLE.get(name, ())]


def pytest_report_header() -> list[str]:
    """Which backends the suite runs on, and why the others are left out; and what else is missing,
    so that the tests that need it are left out."""
    left = {f"backend {name}": error for name, error in _found.items() if name not in _offered}
    return [
        *(f"backend {name}: {_found[name]}" for name in _offered),
        *(f"left out: {name}: {reason}" for name, reason in {**left, **_missing}.items()),
    ]


_offered = [name for name in _found if _asked or not isinstance(_found[name], BackendError)]


def _goes_over(name: str, metafunc: pytest.Metafunc) -> bool:
    found = _found[name]
    return isinstance(found, BackendError) or all(
        suits(name, found, marker) for marker in metafunc.definition.iter_markers("backends")
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``backend`` goes over those that are here and that the test applies to (``backends``)."""
    marked = metafunc.definition.iter_markers("parametrize")
    by_itself = any("backend" in str(marker.args[0]) for marker in marked)
    if "backend" in metafunc.fixturenames and not by_itself:
        names = [name for name in _offered if _goes_over(name, metafunc)]
        metafunc.parametrize("backend", names or [_NONE], indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs what is not here."""
    out = [item for item in items if _left_out(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if not _left_out(item)]


def pytest_collection_finish() -> None:
    """The thousands of tests are not looked at again by each garbage collection."""
    gc.collect()
    gc.freeze()


def _left_out(item: pytest.Item) -> bool:
    params = item.callspec.params if hasattr(item, "callspec") else {}
    needed = {name for marker in item.iter_markers("needs") for name in marker.args}
    return params.get("backend") == _NONE or bool(needed & set(_missing))


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Here:
    found = _found[request.param]
    if isinstance(found, BackendError):
        pytest.fail(f"PORTACNN_TEST_BACKENDS asks for {request.param}: {found}")
    return Here(request.param, found)
