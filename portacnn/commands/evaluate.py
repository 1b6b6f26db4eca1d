"""``portacnn evaluate``: the loss and the metrics of a model on images with labels."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from portacnn import losses
from portacnn.commands import sets
from portacnn.commands.kinds import WORDS, positive
from portacnn.commands.weights import add_options as add_weights
from portacnn.commands.weights import kind_of_images, load_model
from portacnn.console import say
from portacnn.errors import ArgumentError, LabelError
from portacnn.losses import Loss
from portacnn.losses.named import LOSSES
from portacnn.metrics import Metric, metrics_for
from portacnn.models import Model
from portacnn.models.evaluation import evaluate
from portacnn.run_folder import finite
from portacnn.runtime import Array, resolve
from portacnn.text import class_names, listed

HELP = "loss and metrics of a model on images with labels"
_BY_TASK = {"": "cross_entropy", "multiclass": "cross_entropy", "multilabel": "bce_with_logits"}
_BY_TASK |= {"regression": "mse"}
_BATCH = 256


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights(parser)
    add = parser.add_argument
    add(
        "--data",
        required=True,
        metavar="NAME|PATH",
        help="as for portacnn train; images from a folder get the model's size and colours",
    )
    add(
        "--part",
        choices=("test", "train", "all"),
        default="test",
        help="the test set (the default), the training set, or both. A folder without a test set "
        "is split as portacnn train does it",
    )
    add("--test-share", type=float, default=0.2, metavar="SHARE", help="as for portacnn train")
    add(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with an image that cannot be read",
    )
    add("--loss", choices=tuple(LOSSES), metavar="NAME", help="by default that of the model's task")
    add(
        "--metrics",
        type=WORDS.from_word,
        metavar="NAME,...",
        help="such as accuracy,top5,f1; by default the loss's own",
    )
    add("--batch-size", type=positive, default=_BATCH, metavar="N", help=f"by default {_BATCH}")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Evaluate; return the exit status."""
    model = load_model(options.weights, options.device)
    word = options.loss or _BY_TASK.get(model.info.task)
    if word is None:
        raise ArgumentError(f"the model is for {model.info.task!r}; choose its --loss")
    loss = losses.named(word)
    metrics = metrics_for(loss, options.metrics)
    parts = _parts(options, model)
    figures: dict[str, Any] = {"images": sum(map(len, parts))}
    figures |= evaluated(model, parts, loss, metrics, options.batch_size)
    if options.json:
        say(json.dumps(finite(figures), allow_nan=False))
    else:
        say(*_lines(figures, model.info.class_names))
    return 0


def _parts(options: argparse.Namespace, model: Model) -> list[Any]:
    """Return the sets to evaluate on."""
    size: dict[str, Any] = {}
    if sets.is_folder_of_images(options.data):
        (height, width), mode = kind_of_images(model)
        if height != width:
            raise ArgumentError(
                f"the model takes images of {height} x {width} pixels; those of a folder become "
                "square. Save arrays of that shape as an .npz file"
            )
        size = {"image_size": height, "mode": mode}
    train, test = sets.load(
        options.data, test_share=options.test_share, on_error=options.on_error, **size
    )
    return {"train": [train], "test": [test], "all": [train, test]}[options.part]


def evaluated(
    model: Model,
    parts: list[Any],
    loss: Loss,
    metrics: Mapping[str, Metric],
    batch_size: int = _BATCH,
) -> dict[str, Any]:
    """Return loss and metrics over all parts; images are read a batch at a time."""
    home, host = model.home, resolve("numpy")
    checked = [
        loss.check_targets(
            _labels(model, part), model.output_shape, count=len(part), dtype=model.dtype
        )
        for part in parts
    ]
    targets = home.asarray(host.xp.concat(checked, axis=0))
    return evaluate(
        home, _outputs(model, parts, batch_size), targets, loss, metrics, None, model.dtype
    )


def _outputs(model: Model, parts: list[Any], batch_size: int) -> Iterator[tuple[int, int, Array]]:
    """Yield first, last (exclusive) and outputs of each batch, counted over all parts."""
    begin = 0
    for part in parts:
        for first, last, y in model.outputs(part.images, batch_size):
            yield begin + first, begin + last, y
        begin += len(part)


def _labels(model: Model, part: Any) -> Any:
    """Return the labels of a set, as the model numbers its classes.

    Raises:
        LabelError: if the set has a class that the model does not have.
    """
    ours, theirs = model.info.class_names, part.class_names
    if not ours or not theirs or tuple(ours) == tuple(theirs):
        return part.labels
    if unknown := [name for name in theirs if name not in ours]:
        raise LabelError(
            f"the data have the classes {listed(unknown)}, which the model does not know; it knows "
            f"{listed(ours)}"
        )
    xp = resolve("numpy").xp
    return xp.take(xp.asarray([ours.index(name) for name in theirs]), part.labels, axis=0)


def _lines(figures: Mapping[str, Any], names: Sequence[str]) -> Iterator[str]:
    """Yield figures as lines: numbers after their names, lists with the names of the classes."""
    width = max(map(len, figures))
    for name, value in figures.items():
        said = name.replace("_", " ")
        if not isinstance(value, list):
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            yield f"{said:{width}}  {shown}"
            continue
        yield f"{said}:"
        classes = class_names(names, len(value))
        widest = max(map(len, classes), default=0)
        for each, row in zip(classes, value, strict=True):
            cells = row if isinstance(row, list) else [row]
            shown = " ".join(f"{c:>6}" if isinstance(c, int) else f"{c:.4f}" for c in cells)
            yield f"  {each:{widest}}  {shown}"
