"""``portacnn summary``: the layers of a model, and what it knows about itself."""

import argparse
from collections.abc import Iterator

from portacnn.commands.kinds import positive
from portacnn.commands.weights import add_options as add_weights
from portacnn.commands.weights import load_model
from portacnn.console import say
from portacnn.models import ModelInfo
from portacnn.text import listed, printable

HELP = "the layers of a model, and what it knows about itself"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights(parser, device=False)
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=1,
        metavar="N",
        help="images that the memory of the activations is for; by default 1",
    )


def run(options: argparse.Namespace) -> int:
    """Print the summary; return the exit status."""
    model = load_model(options.weights, "cpu")
    known = dict(_known(model.info))
    width = max(map(len, known))
    say(
        model.summary(batch_size=options.batch_size),
        "",
        *(f"{name:{width}}  {value}" for name, value in known.items()),
    )
    return 0


def _known(info: ModelInfo) -> Iterator[tuple[str, str]]:
    """Yield what is known, with its name."""
    if info.task:
        yield "task", printable(info.task)
    if info.class_names:
        yield "classes", f"{len(info.class_names)}: {listed(info.class_names, 10)}"
    if info.preprocess is not None:
        yield "uint8 input", str(info.preprocess)
    if info.input_range:
        yield "input", f"{info.dtype}, from {info.input_range[0]:g} to {info.input_range[1]:g}"
    for name, value in info.figures.items():
        yield printable(name).replace("_", " "), f"{value:.4g}"
    yield "written by", f"portacnn {printable(info.version)}"
