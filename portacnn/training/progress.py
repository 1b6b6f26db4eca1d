"""How far training is, for a person who watches: tqdm's bar where tqdm is installed, else a line an epoch."""

import sys
from typing import Any, Self


class Progress:
    """A context manager around a training run. ``shown=False`` makes it silent."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.shown = shown
        self.bar: Any = None
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self) -> None:
        """One step was made."""
        if self.bar is not None:
            self.bar.update()

    def show(self, epoch: int, **figures: float) -> None:
        """The figures of the moment."""
        if self.bar is not None:
            self.bar.set_description(f"epoch {epoch}", refresh=False)
            self.bar.set_postfix({name: f"{value:.4f}" for name, value in figures.items()})

    def epoch(self, epoch: int, loss: float, train_acc: float, test_acc: float) -> None:
        """The figures of a whole epoch."""
        line = f"epoch {epoch}: loss {loss:.4f}, train accuracy {train_acc:.4f}, test accuracy {test_acc:.4f}"
        if self.bar is not None:
            self.bar.write(line, file=sys.stdout)
        elif self.shown:
            print(line, flush=True)
