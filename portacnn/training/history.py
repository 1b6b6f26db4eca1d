"""``History``: the figures of a training run, of each step and of each epoch."""

from collections.abc import Iterable, Mapping
from typing import Any, Generic, TypeVar

from portacnn.runtime import Array, Backend

Value = TypeVar("Value")


class View(Generic[Value]):
    """An attribute of an object that one of the object's parts holds.

    train_loss_list = View[list[float]]("_history", "steps")
    """

    def __init__(self, part: str, name: str) -> None:
        self._part, self._name = part, name

    def __get__(self, owner: Any, kind: Any = None) -> Value:
        if owner is None:
            return self  # type: ignore[return-value]
        value: Value = getattr(getattr(owner, self._part), self._name)
        return value

    def __set__(self, owner: Any, value: Value) -> None:
        setattr(getattr(owner, self._part), self._name, value)


class History:
    """The figures of a training run.

    Attributes:
        steps: the loss of each step that was fetched from the device
            (``Trainer.train_loss_list``).
        epochs: a list with one value per epoch for each figure (``Trainer.history``).
    """

    def __init__(self, metrics: Iterable[str], tested: bool) -> None:
        self.steps: list[float] = []
        self.epochs: dict[str, list[float]] = {name: [] for name in _names(metrics, tested)}
        self._unread: list[Array] = []  # reports of steps, still on the device

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_unread": []}

    @property
    def count(self) -> int:
        """The number of steps, including those whose losses are still on the device."""
        return len(self.steps) + len(self._unread)

    def add(self, report: Array) -> None:
        """Add a step's report, (loss, whether all was finite), which stays on the device."""
        self._unread.append(report)

    def read(self, home: Backend) -> int | None:
        """Fetch the losses that have accumulated on the device, all together.

        Returns:
            The number of the first step in which not all was finite, None if there is none.
        """
        if not self._unread:
            return None
        fetched = home.to_host(home.xp.stack(self._unread)).tolist()
        fine, begin = [ok for _, ok in fetched], len(self.steps)
        self._unread.clear()
        self.steps.extend(loss for loss, _ in fetched)
        return None if all(fine) else begin + fine.index(0.0)

    def cut(self, steps: int, epochs: int) -> None:
        """Remove what an interrupted epoch has left after so many steps and epochs."""
        self._unread.clear()
        del self.steps[steps:]
        for figures in self.epochs.values():
            del figures[epochs:]

    def end_epoch(self, figures: Mapping[str, Any]) -> None:
        """Append the figures of an epoch, by name."""
        for name, each in self.epochs.items():
            each.append(figures[name])

    def last(self) -> dict[str, Any]:
        """Return the figures of the last epoch, by name."""
        return {name: each[-1] for name, each in self.epochs.items()}


def _names(metrics: Iterable[str], tested: bool) -> list[str]:
    """Return the names of an epoch's figures, in the order of ``Trainer.history``."""
    names = ["train_loss", *(["test_loss"] if tested else [])]
    for name in metrics:
        names += [f"train_{name}", *([f"test_{name}"] if tested else [])]
    return [*names, "lr", "seconds", "images_per_second"]
