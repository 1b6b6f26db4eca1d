"""Arrays for checks: in several memory layouts, compared with what is expected, and read-only."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from portacnn.runtime import Array, Backend, backend_of, dtype_name
from portacnn.testing.report import Fault

DTYPES = ("float32", "float64")
LIMITS = {"float32": 1e-5, "float64": 1e-11}
"""The largest errors, relative to the largest expected value."""
_REFUSED: dict[tuple[str, str], str | None] = {}
LAYOUTS = ("packed", "batch_last", "reversed", "stepped")


def dtypes_of(home: Backend) -> tuple[str, ...]:
    """Return those of DTYPES that the backend has: some devices lack float64."""
    return DTYPES if refusal_of_float64(home) is None else DTYPES[:1]


def refusal_of_float64(home: Backend) -> str | None:
    """Return why the backend has no float64, or None if it has."""
    key = home.name, home.place(home.device)
    if key not in _REFUSED:
        try:
            array = home.asarray(np.zeros(1), "float64")
            lacks = dtype_name(array) != "float64"
            _REFUSED[key] = f"asarray makes {dtype_name(array)} of it" if lacks else None
        except Exception as error:  # of any library
            _REFUSED[key] = f"{type(error).__name__}: {error}"
    return _REFUSED[key]


def needs_float64(home: Backend) -> None:
    """Raise NotImplementedError if the backend has no float64."""
    reason = refusal_of_float64(home)
    if reason is not None:
        raise NotImplementedError(f"float64 on {home}: {reason}")


def laid_out(
    home: Backend, host: Any, layout: str, place: Callable[[Any], Array] | None = None
) -> Array:
    """Return ``host`` on the device: the same shape and values, in memory as ``layout`` says.

    Args:
        layout: "packed": in the order of the axes. "batch_last": the first axis last. "reversed":
            all axes in reversed order. "stepped": every second element of a larger array.
        place: makes an array of a NumPy array; default: ``home.asarray``.
    """
    host, place = np.asarray(host), place or home.asarray
    if layout == "stepped":
        cells = tuple(slice(1, max(2 * n, 1), 2) for n in host.shape)
        wide = np.full([2 * n + 1 for n in host.shape], 99, dtype=host.dtype)
        wide[cells] = host
        return place(wide)[cells]
    axes = tuple(range(host.ndim))
    order = {"packed": axes, "batch_last": (*axes[1:], *axes[:1]), "reversed": axes[::-1]}[layout]
    stored = place(np.ascontiguousarray(host.transpose(order)))
    return home.xp.permute_dims(stored, tuple(int(i) for i in np.argsort(order)))


def error_of(got: Any, expected: Any, limit: float, what: str) -> float:
    """Return the largest error of a NumPy array, relative to the largest expected value.

    Values that are expected to be infinite or NaN must be so. A result equal to the expected one,
    rounded to its dtype, has the error 0.

    Raises:
        Fault: if it is above the limit, or the shape differs.
    """
    expected = np.asarray(expected)
    if got.shape != expected.shape:
        raise Fault(f"{what}: expected shape {expected.shape}, got {got.shape}")
    if expected.dtype.kind != "f":
        if not np.array_equal(got, expected):
            raise Fault(f"{what}: {np.sum(got != expected)} of {expected.size} values differ")
        return 0.0
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True):
        raise Fault(f"{what}: expected {expected[~finite][0]}, got {got[~finite][0]}")
    right, found = expected[finite], got[finite].astype(np.float64)
    if np.array_equal(found, right.astype(got.dtype).astype(np.float64)):
        return 0.0
    largest = float(np.abs(right).max(initial=0.0)) or 1.0
    error = float(np.abs(found - right).max()) / largest
    if not error <= limit:
        at = int(np.argmax(np.abs(found - right)))
        raise Fault(
            f"{what}: {error:.1e} of the largest value off, at most {limit:.0e} expected: "
            f"{found[at]:.6g} instead of {right[at]:.6g}"
        )
    return error


def check_kind(home: Backend, got: Any, like: Array, dtype: str, what: str) -> None:
    """Raise Fault unless ``got`` is an array of like's library, on its device, of this dtype."""
    check_place(home, got, like, what)
    if dtype_name(got) != dtype:
        raise Fault(f"{what}: expected {dtype}, got {dtype_name(got)}")


def check_place(home: Backend, got: Any, like: Array, what: str) -> None:
    """Raise Fault unless ``got`` is an array of like's library, on its device. (NumPy's scalars are
    arrays of its library.)"""
    if backend_of(got).name != backend_of(like).name:
        raise Fault(f"{what}: expected a {type(like).__name__}, got a {type(got).__name__}")
    if got.device != like.device:
        raise Fault(
            f"{what}: expected it on {home.place(like.device)}, got {home.place(got.device)}"
        )


@contextmanager
def unchanged(home: Backend, arrays: dict[str, Array]) -> Iterator[None]:
    """Raise Fault if the arrays do not hold afterwards, bit for bit, what they held before."""
    before = {name: home.to_host(array).tobytes() for name, array in arrays.items()}
    yield
    for name, array in arrays.items():
        if home.to_host(array).tobytes() != before[name]:
            raise Fault(f"it has changed its input {name}")


def read_only(array: Array) -> Array:
    """Make a NumPy array read-only; other libraries have no such flag."""
    if isinstance(array, np.ndarray):
        array.flags.writeable = False
    return array
