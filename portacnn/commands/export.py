"""``portacnn export``: write a model as an ONNX file."""

import argparse

from portacnn import onnx
from portacnn.commands.kinds import positive
from portacnn.commands.weights import add_options as add_weights
from portacnn.commands.weights import load_model
from portacnn.console import say

HELP = "write a model as an ONNX file"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_weights(parser, device=False)
    add = parser.add_argument
    add("out", metavar="OUT.onnx", help="the file to write")
    add("--opset", type=positive, default=18, metavar="N", help="13 to 28; by default 18")
    add("--fixed-batch", action="store_true", help="take one image at a time only")
    add(
        "--dtype",
        choices=("float32", "float64", "float16", "bfloat16"),
        help="of the computation, or of stored weights (float16, bfloat16); by default the model's",
    )
    add(
        "--uint8",
        action="store_true",
        help="take uint8 images; the file then scales them as the model does",
    )


def run(options: argparse.Namespace) -> int:
    """Export; return the exit status."""
    model = load_model(options.weights, "cpu")
    onnx.export(
        model,
        options.out,
        opset=options.opset,
        dynamic_batch=not options.fixed_batch,
        dtype=options.dtype,
        preprocess=options.uint8,
    )
    batch = "1" if options.fixed_batch else "N"
    shape = ", ".join([batch, *map(str, model.input_shape)])
    dtype = "uint8" if options.uint8 else "float64" if options.dtype == "float64" else "float32"
    say(f"wrote {options.out}: input ({shape}) {dtype}, opset {options.opset}")
    return 0
