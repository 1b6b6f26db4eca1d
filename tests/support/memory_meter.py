"""How many bytes Python holds: its own and NumPy's allocations (tracemalloc), and memory maps.
Shares no code with portacnn."""

import gc
import mmap
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


class Meter:
    """Bytes since the meter was started."""

    def __init__(self) -> None:
        self.mapped = self.most_mapped = 0
        self._before = tracemalloc.get_traced_memory()[0]

    def held(self) -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - self._before + self.mapped

    def peak(self) -> int:
        """The most that there was at one time; too much where the two kinds had their peaks at
        different times."""
        return tracemalloc.get_traced_memory()[1] - self._before + self.most_mapped

    def restart_peak(self) -> None:
        tracemalloc.reset_peak()
        self.most_mapped = self.mapped


@contextmanager
def metered(monkeypatch) -> Iterator[Meter]:
    gc.collect()
    gc.freeze()  # ``held`` collects what comes from here on
    tracemalloc.start()
    meter = Meter()

    class Counted(mmap.mmap):
        def __new__(cls, fileno, length, *args, **kwargs):
            self = super().__new__(cls, fileno, length, *args, **kwargs)
            self.counted = length
            meter.mapped += length
            meter.most_mapped = max(meter.most_mapped, meter.mapped)
            return self

        def __del__(self):
            meter.mapped -= self.counted

    monkeypatch.setattr(mmap, "mmap", Counted)
    try:
        yield meter
    finally:
        tracemalloc.stop()
