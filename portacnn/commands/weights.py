"""The argument WEIGHTS of several commands: a model from a file or from a run's folder."""

import argparse
from pathlib import Path
from typing import Literal

from portacnn import run_folder
from portacnn.errors import ArgumentError
from portacnn.models import Model, load
from portacnn.runtime import GRAMMAR, VARIABLE


def add_options(parser: argparse.ArgumentParser, *, device: bool = True) -> None:
    """Add WEIGHTS, and ``--device`` unless the command computes nothing."""
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a model: the folder of a run, the file that it wrote, a checkpoint, or an ONNX file",
    )
    if device:
        parser.add_argument(
            "--device", help=f"{GRAMMAR}; by default the variable {VARIABLE}, else numpy"
        )


def load_model(name: str, device: str | None = None) -> Model:
    """Return the model of a file or a run's folder.

    Raises:
        FileNotFoundError: if there is none.
        ModelFormatError: if it is not a model of portacnn's.
        BackendError: if the device is unavailable.
    """
    path = Path(name)
    if path.is_dir():
        path /= run_folder.PARAMS
        if not path.exists():
            raise FileNotFoundError(
                f"{name} is not the folder of a finished run: it has no {run_folder.PARAMS}"
            )
    elif not path.exists():
        raise FileNotFoundError(f"there is no file or folder {name}")
    if path.suffix.lower() == ".onnx":
        from portacnn import onnx

        return onnx.load(path, device=device)
    return load(path, device=device)


def kind_of_images(model: Model) -> tuple[tuple[int, int], Literal["RGB", "L"]]:
    """Return the height and width of a model's images, and "RGB" or "L".

    Raises:
        ArgumentError: if its samples are no such images.
    """
    shape = model.input_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ArgumentError(
            f"the model takes samples of shape {shape}; image files have 3 channels, or 1 in gray. "
            "Pass arrays of that shape to Model.predict in Python"
        )
    return (shape[1], shape[2]), "L" if shape[0] == 1 else "RGB"
