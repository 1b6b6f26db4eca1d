"""Transfers of batches to a CUDA device during computation: through pinned memory, on a separate
stream.

A copy from pinned memory is asynchronous: neither the host nor the device, which computes the
previous batch, waits for it. Events define the order. The copy waits for the work that the caller's
stream had before it, because the target memory may still be in use there. The caller's stream waits
for the copy when the batch is received. The host waits for the copy before last, whose pinned
memory it then reuses.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.device_runtime import Uploader
from portacnn.runtime import Array, Backend, HostArray

_ALIGNED = 512  # bytes; the alignment of the arrays of a batch


class _Pinned:
    """Pinned memory for one batch, and the event of the last copy from it."""

    def __init__(self) -> None:
        self.memory: Any = None
        self.size = 0
        self.copied: Any = None

    def buffer(self, nbytes: int) -> Any:
        """Return a pinned buffer of at least ``nbytes`` that no copy reads any more."""
        import cupy as cp

        if self.copied is not None:
            self.copied.synchronize()
        if nbytes > self.size:
            self.memory, self.size = cp.cuda.alloc_pinned_memory(nbytes), nbytes
        return self.memory


class _Sent(NamedTuple):
    arrays: tuple[Array, ...]
    copied: Any


class CupyUploader(Uploader):
    """An uploader with at most two batches in flight: a third waits until the first has arrived."""

    def __init__(self, backend: Backend) -> None:
        import cupy as cp

        super().__init__(backend)
        with backend.active():
            self._stream = cp.cuda.Stream(non_blocking=True)
        self._pinned = (_Pinned(), _Pinned())
        self._number = 0

    def send(self, *arrays: HostArray) -> _Sent:
        import cupy as cp

        pinned = self._pinned[self._number % 2]
        self._number += 1
        begins, end = [], 0
        for array in arrays:
            begins.append(end)
            end += -(-array.nbytes // _ALIGNED) * _ALIGNED
        with self.backend.active():
            buffer = pinned.buffer(max(end, 1))
            # Allocated on the caller's stream, where the arrays are used and freed.
            targets = tuple(cp.empty(array.shape, dtype=array.dtype) for array in arrays)
            self._stream.wait_event(cp.cuda.get_current_stream().record())
            for array, target, begin in zip(arrays, targets, begins, strict=True):
                if array.size:
                    staged = np.frombuffer(buffer, array.dtype, array.size, begin).reshape(
                        array.shape
                    )
                    staged[...] = array
                    target.set(staged, stream=self._stream)
            pinned.copied = self._stream.record()
        return _Sent(targets, pinned.copied)

    def receive(self, sent: Any) -> tuple[Array, ...]:
        import cupy as cp

        with self.backend.active():
            cp.cuda.get_current_stream().wait_event(sent.copied)
        return sent.arrays  # type: ignore[no-any-return]
