"""What a report is about: the files of a run, its model, and what the model says about its test
set. Each part that can't be had is None, with the reason in ``problems``."""

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portacnn import data, models, run_folder
from portacnn.errors import PortacnnError
from portacnn.models import Model
from portacnn.plot.classes import Classified, classified
from portacnn.text import shown

MOST_IMAGES = 10_000
_LARGEST = 1 << 20  # bytes of settings
_SAMPLE = "sample"  # the command's word for the bundled digits


@dataclass
class Contents:
    """What is known about a run.

    Attributes:
        folder: of the run.
        settings: of settings.toml, or None.
        history: as ``run_folder.read_history`` returns it, or None.
        model: on the CPU, or None.
        test: the test set, cut to the images that were classified, or None.
        classified: what the model says about it, or None.
        left_out: the number of test images that were not classified.
        problems: (what is missing, why), for people.
    """

    folder: Path
    settings: dict[str, Any] | None = None
    history: dict[str, Any] | None = None
    model: Model | None = None
    test: Any = None
    classified: Classified | None = None
    left_out: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)


def gather(folder: Path, images: int = MOST_IMAGES) -> Contents:
    """Return what there is about a run. Raises FileNotFoundError if it is not the folder of one."""
    files = (run_folder.SETTINGS, run_folder.HISTORY, run_folder.PARAMS)
    if not any((folder / name).is_file() for name in files):
        raise FileNotFoundError(
            f"{shown(folder)} is not the folder of a run: it has none of {', '.join(files)}"
        )
    found = Contents(folder)
    found.settings = _tried(found, "The settings", lambda: _settings(folder))
    found.history = _tried(found, "The history", lambda: run_folder.read_history(folder))
    found.model = _tried(found, "The trained model", lambda: _model(folder))
    if found.settings is not None:
        found.test = _tried(found, "The data", lambda: _test_set(found.settings or {}))
    if found.model is not None and found.test is not None:
        _classify(found, found.model, images)
    return found


def _tried(found: Contents, what: str, read: Any) -> Any:
    """Return ``read()``; None if it fails, for a reason that goes to the problems."""
    try:
        return read()
    except (PortacnnError, OSError, MemoryError, ValueError) as error:
        found.problems.append((what, str(error) or type(error).__name__))
        return None


def _settings(folder: Path) -> dict[str, Any]:
    with (folder / run_folder.SETTINGS).open("rb") as file:
        return tomllib.loads(file.read(_LARGEST).decode())


def _model(folder: Path) -> Model:
    path = folder / run_folder.PARAMS
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {shown(path)}")
    return models.load(path, device="numpy")


def _test_set(settings: dict[str, Any]) -> Any:
    """Return the test set that the run was tested on."""
    name = str(settings.get("data", _SAMPLE))
    known = ("image_size", "mode", "test_share", "on_error")
    options = {each: settings[each] for each in known if each in settings}
    return data.load("mnist-sample" if name == _SAMPLE else name, **options)[1]


def _classify(found: Contents, model: Model, images: int) -> None:
    """Let the model classify the test set, if classes are its task."""
    if model.info.task not in ("", "multiclass") or len(model.output_shape) != 1:
        task = model.info.task or "a task"
        found.problems.append(
            ("Errors by class", f"the run's task is {task} with outputs {model.output_shape}")
        )
        return
    names, theirs = model.info.class_names, found.test.class_names
    if names and theirs and tuple(names) != tuple(theirs) and len(names) == len(theirs):
        found.problems.append(("The data", "their classes are not those that the model was for"))
        found.test = None
        return
    found.left_out = max(len(found.test) - images, 0)
    if found.left_out:
        found.test = found.test.subset(range(images))
    found.classified = _tried(found, "The test images", lambda: classified(model, found.test))
