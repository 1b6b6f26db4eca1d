"""``Ranks``: the processes of a training run, seen from one of them.

Rank 0 shows the progress and writes files. All else happens on all ranks alike.
"""

import builtins
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from portacnn import errors
from portacnn.arguments import plain
from portacnn.distributed import Communicator, SingleProcess, agree
from portacnn.errors import ArgumentError, PortacnnError, StateError
from portacnn.files import make_folder
from portacnn.metrics import Metric
from portacnn.models import Model
from portacnn.runtime import Backend, dtype_name
from portacnn.training.shares import spread

Value = TypeVar("Value")


class Ranks:
    """The processes of a training run. A copy, or a pickle, of it is one process alone.

    Attributes:
        communicator: see ``portacnn.distributed``.
        rank, size: the number of this process, and of all.
    """

    def __init__(self, communicator: Communicator | None = None) -> None:
        self.communicator = SingleProcess() if communicator is None else communicator
        self.rank, self.size = self.communicator.rank, self.communicator.size

    def __reduce__(self) -> Any:
        return Ranks, ()

    def __copy__(self) -> "Ranks":
        return self

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this process shows the progress and writes files."""
        return self.rank == 0

    # --- values -----------------------------------------------------------------------------------

    def share(self, value: Value) -> Value:
        """Return rank 0's value, a JSON value."""
        return value if self.alone else self.communicator.share(plain(value))

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on one of the ranks."""
        return flag if self.alone else self.communicator.any_rank(flag)

    def agree(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Raise ArgumentError on all ranks unless these facts are the same on all of them."""
        if not self.alone:
            agree(self.communicator, facts())

    def on_first(self, function: Callable[[], Value]) -> Value:
        """Run a function on rank 0, and return its result, a JSON value, on all ranks. If it raises
        an error, all ranks raise it."""
        if self.alone:
            return function()
        if self.is_first:
            try:
                value = function()
            except Exception as error:
                kind = type(error).__name__
                text = error.message if isinstance(error, PortacnnError) else str(error)
                self.communicator.share({"error": [kind, text, getattr(error, "where", None)]})
                raise
            self.communicator.share({"value": value})
            return value
        told = self.communicator.share(None)
        if "error" in told:
            raise _error(*told["error"])
        found: Value = told["value"]
        return found

    def folder(self, path: str | os.PathLike[str]) -> Path:
        """Make a folder for checkpoints on rank 0, which writes them; return its absolute path."""
        return Path(self.on_first(lambda: str(make_folder(path).absolute())))

    # --- evaluation -------------------------------------------------------------------------------

    def part(self, count: int, least: int) -> tuple[int, int]:
        """Return the first sample, and the one after the last, that this rank evaluates of
        ``count``: none, or at least ``least``."""
        ranks = min(self.size, max(1, count // least))
        sizes = [*spread(count, ranks), *[0] * (self.size - ranks)]
        first = sum(sizes[: self.rank])
        return first, first + sizes[self.rank]

    def total(self, share: float) -> float:
        """Return the sum of the shares of all ranks."""
        return share if self.alone else sum(self.communicator.gather(share))

    def join(self, metric: Metric, home: Backend) -> None:
        """Give the metric the batches of all ranks, in their order."""
        if self.alone:
            return
        own, xp = metric.pieces(), home.xp
        forms = [[list(map(int, piece.shape)), dtype_name(piece)] for piece in own]
        known = self.communicator.gather(forms)
        joined = []
        for number, (shape, dtype) in enumerate(next((each for each in known if each), [])):
            if metric.adds_up:
                slot, length = slice(0, shape[0]), shape[0]
            else:
                rows = [each[number][0][0] if each else 0 for each in known]
                first, length = sum(rows[: self.rank]), sum(rows)
                slot = slice(first, first + rows[self.rank])
            whole = xp.zeros((length, *shape[1:]), dtype=home.dtype(dtype), device=home.device)
            if own:
                whole[slot, ...] = own[number]
            self.communicator.all_reduce(whole)
            joined.append(whole)
        if joined:
            metric.put(tuple(joined))

    # --- the beginning ----------------------------------------------------------------------------

    def begin(self, model: Model) -> None:
        """Give all ranks rank 0's weights, running statistics and seeds of random layers."""
        if self.alone:
            return
        layers = list(model.walk())
        for layer, seed in zip(layers, self.share([layer.seed for layer in layers]), strict=True):
            layer.seed = seed
        for array in (*model.named_parameters().wholes(), *model.named_buffers().wholes()):
            self.communicator.broadcast(array)

    def check_metrics(self, metrics: Mapping[str, Metric]) -> None:
        """Raise ArgumentError if the parts of a metric cannot be joined."""
        for name, metric in () if self.alone else metrics.items():
            if type(metric).pieces is Metric.pieces or type(metric).put is Metric.put:
                raise ArgumentError(
                    f"each of {self.size} processes evaluates a part of a set, and the metric "
                    f"{name} ({type(metric).__name__}) has no methods pieces and put that join "
                    "the parts; define them, or leave the metric out"
                )


def _error(kind: str, text: str, where: str | None) -> Exception:
    """Return the error that rank 0 raised."""
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, PortacnnError):
        return known(text, where)
    known = getattr(builtins, kind, None)
    if isinstance(known, type) and issubclass(known, OSError):
        return known(text)
    return StateError(f"rank 0 raised {kind}: {text}")
