"""Show the progress of a training run: tqdm's bar on a terminal or in a notebook if tqdm is
installed, else one line per epoch."""

import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Self

from portacnn.console import in_notebook, is_watched, say


def _bar() -> tuple[Any, dict[str, Any]]:
    """Return tqdm's class for a terminal or a notebook, and how wide it is."""
    if in_notebook(sys.stderr) and find_spec("ipywidgets") is None:
        # On stdout like the lines, so that they follow each other in one output. tqdm.auto would
        # warn about the missing package, and another stream would begin an output for each epoch.
        from tqdm import tqdm

        return tqdm, {"file": sys.stdout, "ncols": 80}
    from tqdm.auto import tqdm as auto

    return auto, {"dynamic_ncols": True}


class Progress:
    """Context manager that shows the progress of a training run. ``shown=False`` makes it
    silent."""

    def __init__(self, total: int, done: int, shown: bool) -> None:
        self.shown = shown
        self.bar: Any = None
        if shown and is_watched(sys.stderr):  # in a file, a bar would take thousands of lines
            try:
                kind, options = _bar()
            except ImportError:
                return
            self.bar = kind(total=total, initial=done, unit="step", **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._draw("close")

    def _draw(self, what: str, *figures: Any, **more: Any) -> None:
        """Call a method of the bar. If the terminal is gone, drop the bar and continue."""
        if self.bar is not None:
            try:
                getattr(self.bar, what)(*figures, **more)
            except (OSError, ValueError):
                self.bar = None

    def step(self) -> None:
        """Count one step."""
        self._draw("update")

    def show(self, epoch: int, **figures: float) -> None:
        """Show the current figures."""
        self._draw("set_description", f"epoch {epoch}", refresh=False)
        self._draw("set_postfix", {name: f"{value:.4f}" for name, value in figures.items()})

    def epoch(self, epoch: int, figures: Mapping[str, Any]) -> None:
        """Show the figures of a finished epoch: the training loss and all metrics that are numbers,
        or both losses if there are no metrics."""
        if not self.shown:
            return
        self._draw("clear")
        numbers = {
            name: value
            for name, value in figures.items()
            if name.startswith(("train_", "test_")) and isinstance(value, float)
        }
        if len(numbers) > 2:
            numbers.pop("test_loss", None)
        shown = (
            f"{'loss' if name == 'train_loss' else name.replace('_', ' ')} {value:.4f}"
            for name, value in numbers.items()
        )
        say(f"epoch {epoch}: {', '.join(shown)}")
        self._draw("refresh")
