"""How far training is, for a person who watches: tqdm's bar on a terminal where tqdm is installed,
else a line an epoch."""

import sys
from typing import Any, Self

from portacnn.console import is_watched, say


class Progress:
    """A context manager around a training run. ``shown=False`` makes it silent."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.shown = shown
        self.bar: Any = None
        if shown and is_watched(sys.stderr):  # in a file, a bar would be thousands of lines
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._draw("close")

    def _draw(self, what: str, *figures: Any, **more: Any) -> None:
        """Have the bar do something. A terminal that has gone takes the bar with it, and nothing
        else."""
        if self.bar is not None:
            try:
                getattr(self.bar, what)(*figures, **more)
            except (OSError, ValueError):
                self.bar = None

    def step(self) -> None:
        """One step was made."""
        self._draw("update")

    def show(self, epoch: int, **figures: float) -> None:
        """The figures of the moment."""
        self._draw("set_description", f"epoch {epoch}", refresh=False)
        self._draw("set_postfix", {name: f"{value:.4f}" for name, value in figures.items()})

    def epoch(self, epoch: int, loss: float, train_acc: float, test_acc: float) -> None:
        """The figures of a whole epoch."""
        if not self.shown:
            return
        self._draw("clear")
        say(
            f"epoch {epoch}: loss {loss:.4f}, train accuracy {train_acc:.4f}, test accuracy "
            f"{test_acc:.4f}"
        )
        self._draw("refresh")
