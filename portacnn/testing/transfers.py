"""Hidden transfers: what would carry a value from the device to the host behind the program's back.

On a GPU such a transfer waits for the device, in every step. ``no_transfers`` makes it an error on
any library whose array class is written in Python, so also where there is no GPU.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from portacnn.runtime import Backend
from portacnn.testing.report import Fault, NotApplicable

TRAPPED = (
    *("__float__", "__int__", "__bool__", "__index__", "__complex__", "__array__", "__dlpack__"),
    *("to_device", "item", "tolist", "numpy", "cpu", "get"),
)
"""The methods of an array that copy values to the host."""


class TransferFault(Fault):
    """A value went to the host unasked."""


@contextmanager
def _replaced(owner: type, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _refusing(name: str) -> Any:
    def method(self: Any, *args: Any, **options: Any) -> Any:
        raise TransferFault(f"a transfer to the host: {name} of {type(self).__name__}")

    return method


def check_seen(home: Backend) -> None:
    """Raise NotApplicable if hidden transfers cannot be seen on this backend."""
    kind = type(home.asarray(np.zeros(1, np.float32)))
    if issubclass(kind, np.ndarray):
        raise NotApplicable("NumPy's arrays are in the host's memory")
    try:
        with _replaced(kind, "__float__", _refusing("__float__")):
            pass
    except TypeError as error:
        raise NotApplicable(f"the methods of {kind.__name__} cannot be replaced: {error}") from None


@contextmanager
def no_transfers(home: Backend) -> Iterator[None]:
    """Make transfers from the device to the host raise ``TransferFault`` within the context, where
    that is possible (``check_seen``)."""
    try:
        check_seen(home)
    except NotApplicable:
        yield
        return
    kind = type(home.asarray(np.zeros(1, np.float32)))
    with ExitStack() as stack:
        for name in TRAPPED:
            if hasattr(kind, name):
                stack.enter_context(_replaced(kind, name, _refusing(name)))
        stack.enter_context(_replaced(type(home), "to_host", _refusing("Backend.to_host")))
        yield
