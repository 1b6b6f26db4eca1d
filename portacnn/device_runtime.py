"""``DeviceRuntime``: memory, streams and step compilation of an asynchronous device. Every method
has a default.

The defaults are enough for a library on the CPU. CuPy has a current device, memory that can run
out, streams that send data during computation, and graphs that replay a whole training step.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

Array = Any  # the standard defines no base class to annotate with
HostArray = Any  # a numpy.ndarray

NOTHING: AbstractContextManager[None] = nullcontext()


class DeviceRuntime:
    """The part of ``Backend`` that concerns the device and not the arrays.

    Attributes:
        enters: whether computations need a context, which the adapter implements in ``active`` and
            ``elsewhere``: a device that must be the library's current one, or a state in which
            NumPy does not warn.
        compiles: whether training steps and predictions are compiled by default
            (``compile_step``, ``compile_pass``).
    """

    enters: ClassVar[bool] = False
    compiles: ClassVar[bool] = False

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions of ``ops.use_precision`` that this device supports. For any other it
        computes in float32.
        """
        return ("float32",)

    def synchronize(self) -> None:
        """Wait until the device has finished all work submitted to it."""

    def active(self) -> AbstractContextManager[Any]:
        """Return a context in which the library computes on this device and does not warn of NaN or
        infinity."""
        return NOTHING

    def elsewhere(self, device: Any) -> AbstractContextManager[Any] | None:
        """Return the context to enter before computing on ``device``, or None if none is needed."""
        return None

    def free_memory(self) -> int | None:
        """Return the number of free bytes on the device, or None if it has no memory of its own."""
        return None

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether an error says that the device has not enough memory."""
        return isinstance(error, MemoryError)

    def memory_error(self, error: BaseException) -> tuple[int, int] | None:
        """Return (bytes requested, bytes in use) of an out-of-memory error, or None if the error
        does not contain them.
        """
        return None

    def uploader(self) -> "Uploader":
        """Return an ``Uploader``, which sends batches to the device during computation."""
        return Uploader(self)

    def compile_step(
        self, step: Callable[..., Any], example: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """Return a function equal to ``step``, compiled for arguments like ``example`` if the
        backend supports it.
        """
        return step

    def compile_pass(self, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        """Return a function equal to ``function``, a forward pass without a cache, compiled for
        each kind of array if ``compiles``."""
        return function


class Uploader:
    """Sends batches from the host to the device. An adapter derives from it if copies can overlap
    computation.
    """

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def send(self, *arrays: HostArray) -> Any:
        """Start sending NumPy arrays and return a handle for ``receive``. The caller may overwrite
        its arrays at once.
        """
        return tuple(self.backend.asarray(array) for array in arrays)

    def receive(self, sent: Any) -> tuple[Array, ...]:
        """Return the arrays of one ``send`` on the device, in their own dtypes, ready for the next
        operations.
        """
        return sent
