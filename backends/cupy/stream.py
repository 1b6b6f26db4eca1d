"""Batches from the host to a CUDA device while it computes: by way of pinned memory, on a stream of
their own.

A copy from pinned memory goes on by itself, so nobody waits: not the host, and not the device,
which is busy with the batch before. Who waits for whom is said by events. The copy waits for what
the caller's stream was given before it, since the memory it writes to may still be in use there.
The caller's stream waits for the copy when the batch is received, and no sooner. The host waits for
the copy before last, and then writes into the pinned memory of that one again.
"""

from typing import Any, NamedTuple

import numpy as np

from portacnn.device_runtime import Uploader
from portacnn.runtime import Array, Backend, HostArray

_ALIGNED = 512  # bytes: every array of a batch begins at a multiple of it


class _Pinned:
    """Pinned memory for one batch, and the event of the last copy out of it."""

    def __init__(self) -> None:
        self.memory: Any = None
        self.size = 0
        self.copied: Any = None

    def room(self, nbytes: int) -> Any:
        """Pinned bytes, as many or more, which no copy is reading any more."""
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
    """Two batches on their way at most: a third waits until the first has arrived."""

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
            room = pinned.room(max(end, 1))
            # Allocated for the caller's stream, where they will be used and freed.
            targets = tuple(cp.empty(array.shape, dtype=array.dtype) for array in arrays)
            self._stream.wait_event(cp.cuda.get_current_stream().record())
            for array, target, begin in zip(arrays, targets, begins, strict=True):
                if array.size:
                    staged = np.frombuffer(room, array.dtype, array.size, begin).reshape(
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
