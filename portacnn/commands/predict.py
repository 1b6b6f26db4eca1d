"""``portacnn predict``: what a model says about image files."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from portacnn.commands.kinds import positive
from portacnn.commands.messages import message
from portacnn.commands.weights import add_options as add_weights
from portacnn.commands.weights import kind_of_images, load_model
from portacnn.console import say
from portacnn.data.decoding import decode
from portacnn.data.image_folder import MAX_PIXELS
from portacnn.errors import ArgumentError, DataFormatError
from portacnn.losses.outputs import predictions, scores
from portacnn.models import Model
from portacnn.run_folder import finite
from portacnn.runtime import HostArray, resolve
from portacnn.text import class_names, printable

HELP = "classes and probabilities of image files"
_BATCH = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights(parser)
    add = parser.add_argument
    add(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="an image file; it is resized and cropped to the model's size, as in training",
    )
    add("--top", type=positive, default=3, metavar="K", help="classes to print; by default 3")
    add("--json", action="store_true", help="print JSON, a list with an entry for each image")


def run(options: argparse.Namespace) -> int:
    """Predict; return the exit status: 1 if an image could not be read."""
    model = load_model(options.weights, options.device)
    size, mode = kind_of_images(model)
    failed, found = False, []
    names = options.images
    for first in range(0, len(names), _BATCH):
        some = names[first : first + _BATCH]
        images, errors = _read(some, size, mode)
        failed |= bool(errors)
        results = iter(_predicted(model, images, options.top)) if images else iter(())
        for name in some:
            if name in errors:
                say(f"error: {errors[name]}", error=True)
                found.append({"image": name, "error": errors[name]})
                continue
            result = next(results)
            found.append({"image": name, **result})
            if not options.json:
                say(f"{printable(name)}  {_line(result)}")
    if options.json:
        say(json.dumps(finite(found), allow_nan=False, indent=1))
    return int(failed)


def _read(
    names: Sequence[str], size: tuple[int, int], mode: str
) -> tuple[list[HostArray], dict[str, str]]:
    """Return the images that can be read, and by name why the others cannot."""
    images, errors = [], {}
    for name in names:
        try:
            if not os.path.exists(name):
                raise FileNotFoundError(f"there is no file {name}")
            images.append(decode(Path(name), name, size, mode, MAX_PIXELS))
        except OSError as error:
            errors[name] = message(error)
        except DataFormatError as error:  # what it says to do is about a folder of images
            errors[name] = str(error).partition("; ")[0]
    return images, errors


def _predicted(model: Model, images: list[HostArray], top: int) -> Iterator[dict[str, Any]]:
    """Yield for each image what the model says: the ``top`` classes with their probabilities (of
    maps, the shares of the pixels), or values."""
    home, host = model.home, resolve("numpy").xp
    outputs = model.predict(_as_trained(model, host.stack(images)))
    task = model.info.task or "multiclass"
    if task not in ("multiclass", "multilabel"):
        for values in home.to_host(outputs):
            yield {"values": values.tolist()}
        return
    classes, maps = outputs.shape[1], outputs.ndim > 2
    names = class_names(model.info.class_names, classes)
    read = predictions if maps else scores
    with home.active():
        read_out = home.to_host(read(outputs, task))
    for row in read_out:
        if maps and task == "multiclass":  # the class of every pixel
            each = [float(host.mean(host.astype(row == c, host.float64))) for c in range(classes)]
        else:
            each = host.mean(host.reshape(row, (classes, -1)), axis=1).tolist()
        order = sorted(range(classes), key=lambda index: -each[index])[:top]
        word = "share" if maps else "probability"
        yield {"classes": [{"class": names[index], word: each[index]} for index in order]}


def _as_trained(model: Model, images: HostArray) -> HostArray:
    """Return uint8 images (N, C, H, W) as the model was trained on them: as they are if it has a
    ``preprocess``, otherwise scaled to the range that it knows.

    Raises:
        ArgumentError: if it knows neither.
    """
    if model.preprocess is not None:
        return images
    known, host = model.info.input_range, resolve("numpy").xp
    if not known or known[0] < 0.0:
        raise ArgumentError(
            "the model does not say which pixels it was trained on; set model.preprocess = "
            "portacnn.Normalize(...) in Python and save it again"
        )
    scale = 255.0 if known[1] <= 1.0 else 1.0
    return host.astype(images, host.float32) / scale


def _line(result: dict[str, Any]) -> str:
    """Return the result of one image for people."""
    if "values" in result:
        return " ".join(f"{value:.4g}" for value in _flat(result["values"])[:16])
    pairs = (tuple(each.values()) for each in result["classes"])
    return ", ".join(f"{printable(name)} {value:.4f}" for name, value in pairs)


def _flat(values: Any) -> list[float]:
    if isinstance(values, list):
        return [one for inner in values for one in _flat(inner)]
    return [values]
