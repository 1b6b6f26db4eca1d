"""``portacnn search``: similar images. ``build`` makes an index of images, ``query`` finds those
that are like an image."""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

from portacnn.commands import sets
from portacnn.commands.kinds import positive
from portacnn.commands.predict import pixels_of
from portacnn.commands.weights import load_model
from portacnn.console import say
from portacnn.data.folders import images_below
from portacnn.errors import ArgumentError, DataFormatError, ModelFormatError
from portacnn.files import make_folder, write_atomically
from portacnn.layers import Layer
from portacnn.models import Model
from portacnn.runtime import GRAMMAR, VARIABLE, Array, HostArray
from portacnn.search import METRICS, Index
from portacnn.text import class_names, printable, shown

HELP = "find images that look like an image: build an index, query it"
_BATCH = 64


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the two commands and their options."""
    commands = parser.add_subparsers(dest="search", metavar="COMMAND", required=True)
    build = commands.add_parser("build", help="make an index of a folder of images, or of a set")
    add = build.add_argument
    add(
        "data",
        metavar="FOLDER|DATA",
        help="a folder with images, at any depth; or a set, as --data of portacnn train",
    )
    add("--weights", required=True, metavar="WEIGHTS", help="a model, as for portacnn predict")
    add("--out", required=True, metavar="INDEX", help="the file to write")
    add(
        "--layer",
        metavar="PATH",
        help="the layer whose outputs represent an image, as in portacnn summary; by default the "
        "one before the last, of a model for embeddings the last",
    )
    add("--metric", choices=METRICS, default="cosine", help="by default cosine")
    query = commands.add_parser("query", help="find the images of an index that are like others")
    add = query.add_argument
    add("index", metavar="INDEX", help="the file that build wrote")
    add("images", metavar="IMAGE", nargs="+", help="an image file")
    add("--top", type=positive, default=10, metavar="K", help="images to find; by default 10")
    add("--json", action="store_true", help="print JSON, a list with an entry for each image")
    add("--sheet", metavar="FILE.png", help="draw the images and those that were found")
    add("--weights", metavar="WEIGHTS", help="the model, if its file has another place now")
    for command, run_it in ((build, _build), (query, _query)):
        command.add_argument(
            "--device", help=f"{GRAMMAR}; by default the variable {VARIABLE}, else numpy"
        )
        shared: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
        command.add_argument("--debug", help="show the traceback of an error", **shared)
        command.set_defaults(run_search=run_it)


def run(options: argparse.Namespace) -> int:
    """Run ``build`` or ``query``; return the exit status."""
    return int(options.run_search(options))


# --- build ----------------------------------------------------------------------------------------


def _build(options: argparse.Namespace) -> int:
    """Make an index; return the exit status: 1 if an image could not be read."""
    model = load_model(options.weights, options.device)
    layer = _layer_before_the_last(model) if options.layer is None else options.layer
    make_folder(Path(options.out).absolute().parent, "the index")
    folder = Path(options.data)
    files = images_below(folder) if sets.is_path(options.data) and folder.is_dir() else []
    pieces: list[Array] = []
    names: list[str] = []
    failed = False
    batches = _of_files(model, folder, files) if files else _of_set(model, options.data)
    for images, their_names, errors in batches:
        for error in errors:
            say(f"error: {error}", error=True)
        failed |= bool(errors)
        if their_names:
            pieces.append(_embedded(model, images, layer))
            names += their_names
    if not names:
        raise DataFormatError(f"{shown(options.data)}: no image could be read")
    about = {
        "data": sets.absolute(options.data),
        "files": bool(files),
        "weights": os.path.abspath(options.weights),
        "layer": layer,
        "model": _fingerprint(model),
    }
    with model.home.active():
        index = Index(
            model.home.xp.concat(pieces, axis=0), names, metric=options.metric, about=about
        )
    index.save(options.out)
    width = index.embeddings.shape[1]
    say(f"wrote {options.out}: {len(index):,} images, {width} values each, of {layer or 'outputs'}")
    return int(failed)


def _of_files(
    model: Model, folder: Path, files: Sequence[str]
) -> Iterator[tuple[Any, list[str], list[str]]]:
    """Yield batches of image files: images, their names, and why others cannot be read."""
    for first in range(0, len(files), _BATCH):
        paths = {str(folder / name): name for name in files[first : first + _BATCH]}
        images, errors = pixels_of(model, list(paths))
        read = [name for path, name in paths.items() if path not in errors]
        yield images, read, list(errors.values())


def _of_set(model: Model, data: str) -> Iterator[tuple[Any, list[str], list[str]]]:
    """Yield batches of a set, the training images first. A name is a part, a number and a class:
    "test/12 seven"."""
    for part, images in zip(("train", "test"), sets.load(data), strict=True):
        labels, known = images.labels, images.class_names
        if labels.ndim == 1 and known:
            said = class_names(known, len(known))
            words = [f"{part}/{i} {said[int(label)]}" for i, label in enumerate(labels)]
        else:
            words = [f"{part}/{i}" for i in range(len(images))]
        for first in range(0, len(images), 4 * _BATCH):
            last = min(first + 4 * _BATCH, len(images))
            yield images.images[first:last, ...], words[first:last], []


def _layer_before_the_last(model: Model) -> str | None:
    """Return the path of the layer whose output the last layer takes; None for the outputs."""
    before: str | None = None
    layer: Layer = model
    if model.info.task == "embedding":
        return None
    while layer.children:
        *others, layer = layer.children.values()
        before = others[-1].path if others else before
    return before


def _embedded(model: Model, images: Any, layer: str | None) -> Array:
    """Return the embeddings of images, (N, D)."""
    y = model.predict(images) if layer is None else model.features(images, layer)
    with model.home.active():
        return model.home.xp.reshape(y, (y.shape[0], -1))


def _fingerprint(model: Model) -> str:
    """Return a hash of a model's parameters and buffers."""
    seen = hashlib.sha256()
    for path, array in sorted(model.state_dict().items()):
        seen.update(f"{path} {array.dtype} {array.shape}".encode())
        seen.update(array.tobytes())
    return seen.hexdigest()


# --- query ----------------------------------------------------------------------------------------


def _query(options: argparse.Namespace) -> int:
    """Find similar images; return the exit status: 1 if an image could not be read."""
    index = Index.load(options.index, device=options.device)
    about = _about(index, options.index)
    model = load_model(options.weights or about["weights"], options.device)
    if _fingerprint(model) != about["model"]:
        raise ArgumentError(
            f"{options.index} was made with another model than "
            f"{shown(options.weights or about['weights'])} is now; build it again, or give its "
            "model: --weights"
        )
    home, k = model.home, min(options.top, len(index))
    images, errors = pixels_of(model, options.images)
    places: list[list[int]] = []
    distances: list[list[float]] = []
    if images is not None:
        found = index.query(_embedded(model, images, about["layer"]), k)
        places = home.to_host(found.indices).tolist()
        distances = home.to_host(found.distances).tolist()
    answers = zip(places, distances, strict=True)
    told: list[dict[str, Any]] = []
    for name in options.images:
        if name in errors:
            say(f"error: {errors[name]}", error=True)
            told.append({"image": name, "error": errors[name]})
            continue
        near: list[dict[str, Any]] = [
            {"name": _path(index, i), "distance": d} for i, d in zip(*next(answers), strict=True)
        ]
        told.append({"image": name, "neighbors": near})
        if not options.json:
            say(printable(name))
            for each in near:
                say(f"  {each['distance']:.4f}  {printable(each['name'])}")
    if options.json:
        say(json.dumps(told, allow_nan=False, indent=1))
    if options.sheet and images is not None:
        read = [name for name in options.images if name not in errors]
        _draw(options.sheet, model, index, images, places, read)
    return int(bool(errors))


def _about(index: Index, path: str) -> dict[str, Any]:
    """Return what ``build`` has noted in an index. Raises ModelFormatError if it is not from
    there."""
    about = index.about
    kinds = {"data": str, "files": bool, "weights": str, "model": str, "layer": str | None}
    if index.names is None or not all(
        name in about and isinstance(about[name], kind) for name, kind in kinds.items()
    ):
        raise ModelFormatError(
            f"{path} does not say which model and which images it is of; make it with portacnn "
            "search build"
        )
    return about


def _path(index: Index, place: int) -> str:
    """Return the name of an entry for people: of a file, its path."""
    assert index.names is not None
    name = index.names[place]
    return os.path.join(index.about["data"], name) if index.about["files"] else name


def _draw(
    path: str,
    model: Model,
    index: Index,
    queries: HostArray,
    places: list[list[int]],
    names: Sequence[str],
) -> None:
    """Write a contact sheet: each query, and what was found for it."""
    from portacnn import plot

    wanted = sorted({*chain.from_iterable(places)})
    images = dict(zip(wanted, _images(model, index, wanted), strict=True))
    figure = plot.neighbors(
        list(queries),
        [[images[i] for i in row] for row in places],
        captions=[
            [os.path.basename(name), *(os.path.basename(_path(index, i)) for i in row)]
            for name, row in zip(names, places, strict=True)
        ],
    )
    content = BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    say(f"wrote {path}", error=True)  # beside --json on stdout


def _images(model: Model, index: Index, places: Sequence[int]) -> list[Any]:
    """Return images of an index; None for files that are gone."""
    if index.about["files"]:
        return [
            None if image is None else image[0, ...]
            for image in (pixels_of(model, [_path(index, i)])[0] for i in places)
        ]
    parts = sets.load(index.about["data"])
    if sum(map(len, parts)) != len(index):
        raise DataFormatError(f"{shown(index.about['data'])} has changed; build the index again")
    first = len(parts[0])
    return [
        parts[0].images[i, ...] if i < first else parts[1].images[i - first, ...] for i in places
    ]
