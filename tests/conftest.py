"""One suite, run once for every backend that is here.

``backend`` is a fixture over NumPy, NumPy with read-only inputs, array-api-strict on its CPU and on
``device1``, torch, and CuPy and torch on CUDA where there is a GPU; the header of a run says why
any of them is left out. ``PORTACNN_TEST_BACKENDS=cupy,torch`` asks for some by name, and one that
is asked for and missing fails. ``device1`` stands in for a GPU: there, everything that would carry
a value to the host unasked raises. ``cupy-emulated``, only by name, is CuPy's backend with its own
kernels on a stand-in for CuPy (``support/fake_cupy``), where there is no GPU.
``PORTACNN_TEST_SECONDS=60`` skips what would begin later than that: for a GPU that is lent for
minutes.
"""

import os
import time

_begun = time.monotonic()
# one worker a core already: BLAS reads this when NumPy is first imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import hypothesis
import pytest

from portacnn.errors import BackendError
from portacnn.runtime import Backend, resolve
from support import fake_cupy
from support.matrix import BACKENDS, BY_NAME_ONLY, Here

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
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


def pytest_report_header() -> list[str]:
    """Which backends the suite runs on, and why the others are left out; and whether there are
    compiled kernels."""
    backends = [
        f"backend {name}: "
        f"{f'left out: {found}' if isinstance(found, BackendError) else f'tested, {found}'}"
        for name, found in _found.items()
    ]
    if find_spec("numba") is None:
        return [*backends, "numba: not installed, compiled kernels left out"]
    return [*backends, f"numba {version('numba')}: compiled kernels tested"]


@pytest.fixture(
    scope="session",
    params=[name for name in _found if _asked or not isinstance(_found[name], BackendError)],
)
def backend(request: pytest.FixtureRequest) -> Here:
    found = _found[request.param]
    if isinstance(found, BackendError):
        pytest.fail(f"PORTACNN_TEST_BACKENDS asks for {request.param}: {found}")
    return Here(request.param, found)
