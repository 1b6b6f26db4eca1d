"""The folder of a run, which ``portacnn train`` writes: the names of its files, and its history.

settings.toml        repeats the run: portacnn train --settings RUN/settings.toml
params.safetensors   the trained model; ``portacnn.load`` reads it
history.json         the figures of every epoch and step, and what the run ran on
accuracy.csv         the figures of every epoch, for a spreadsheet
curves.png           a picture of them, if matplotlib is installed
report.html          a page about the run, written by ``portacnn report``
checkpoints/         what a training is resumed from, if it was asked for or was stopped
"""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from portacnn.errors import DataFormatError
from portacnn.files import write_atomically

SETTINGS = "settings.toml"
PARAMS = "params.safetensors"
HISTORY = "history.json"
ACCURACY = "accuracy.csv"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
SAMPLE = "sample"
"""The word of commands and settings for "mnist-sample", the digits that come with portacnn."""
FORMAT = 1
"""Number of the format of history.json."""
_LARGEST = 1 << 30  # bytes of a history


def set_name(word: str) -> str:
    """Return the ``portacnn.data.load`` name or path for a word of commands and settings."""
    return "mnist-sample" if word == SAMPLE else word


def clear(folder: Path, *, keep: str | None = None) -> None:
    """Remove the files of an earlier run, except ``keep``, so that those of two runs are never side
    by side. Checkpoints stay: their names say which run they belong to."""
    for name in (SETTINGS, PARAMS, HISTORY, ACCURACY, CURVES, REPORT):
        if name != keep:
            (folder / name).unlink(missing_ok=True)


def write_history(
    folder: Path,
    history: Mapping[str, Sequence[Any]],
    step_losses: Sequence[float],
    environment: Mapping[str, Any],
) -> None:
    """Write history.json: ``Trainer.history``, the losses of all steps, and what it ran on.

    A figure that is not finite becomes null.

    Raises:
        OSError: if it cannot be written.
    """
    content = {
        "format": FORMAT,
        "history": history,
        "step_losses": step_losses,
        "environment": environment,
    }
    text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False, indent=1)
    write_atomically(folder / HISTORY, (text + "\n").encode("utf-8", "backslashreplace"))


def read_history(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a run's history.json: "history" (lists by name), "step_losses" and
    "environment".

    Raises:
        FileNotFoundError: if the folder has none.
        DataFormatError: if it is damaged or another program's.
    """
    path = Path(folder) / HISTORY
    with path.open("rb") as file:
        content = file.read(_LARGEST)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataFormatError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataFormatError(f"{path} is not the history of a run in format {FORMAT}")
    kinds = {"history": dict, "step_losses": list, "environment": dict}
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise DataFormatError(f"{path}: {name!r} is missing or damaged")
    if not all(isinstance(figures, list) for figures in found["history"].values()):
        raise DataFormatError(f"{path}: 'history' must hold lists")
    return {name: found[name] for name in kinds}


def table(history: Mapping[str, Sequence[Any]]) -> str:
    """Return accuracy.csv: a line per epoch with its training loss and all metrics that are
    numbers."""
    columns = {
        "loss" if name == "train_loss" else name: values
        for name, values in history.items()
        if name.startswith(("train_", "test_"))
        and name != "test_loss"
        and all(isinstance(value, int | float) for value in values)
    }
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["epoch", *columns])
    for epoch, row in enumerate(zip(*columns.values(), strict=True), start=1):
        shown = (f"{v:.6f}" if n == "loss" else v for n, v in zip(columns, row, strict=True))
        writer.writerow([epoch, *shown])
    return text.getvalue()


def finite(value: Any) -> Any:
    """Return JSON values with None for each number that is NaN or infinite."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
