"""``export``: a network as an ONNX file, for inference by others' tools.

The layers are walked in their order, and each is written into the graph by its emitter
(``builder``, ``layers``). The file takes samples as the network does and gives what
``predict`` gives. It is checked before it is written, and written whole or not at all. A protocol
buffer cannot be larger than 2 GB: weights that are lie in a second file beside it, which the first
one names.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import portacnn.onnx.layers  # noqa: F401 (enters the emitters of portacnn's own layers)
from portacnn.arguments import one_of, whole
from portacnn.errors import ArgumentError, ModelFormatError, PortacnnError, ShapeError, StateError
from portacnn.files import beginning, file_path, link_target, write_atomically
from portacnn.layers import Layer
from portacnn.onnx.builder import CODES, GraphBuilder, Stored
from portacnn.onnx.library import onnx_library

OLDEST, NEWEST = 13, 28
"""The opsets that can be written."""
INPUT, OUTPUT, BATCH = "input", "output", "N"
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_INLINE = (1 << 31) - (64 << 20)  # bytes of weights that fit into one file, with room for the graph
_SMALL = 1024  # bytes up to which an array stays in the graph's file
# bytes of the first file's name in that of the second, which 255 must be enough for
_LONGEST_PREFIX = 200
# each array in the second file starts at a multiple, so that it can be mapped into memory
_PAGE = 4096


def export(
    model: Layer,
    path: str | os.PathLike[str],
    *,
    input_shape: Sequence[int] | None = None,
    opset: int = 18,
    dynamic_batch: bool = True,
    dtype: str | None = None,
    preprocess: bool = False,
) -> None:
    """Write a network, or any layer, as an ONNX file that gives what its ``forward`` gives outside
    training.

    The graph's input is called "input", its output "output". Initializers are called by their
    parameters' paths, nodes by their layers' ("layer1.0.conv1/Conv").

    Args:
        model: built, on any backend. One that is not built yet is built for ``input_shape``, with
            fresh weights.
        path: of the file. More than 2 GB of weights go to a second one beside it,
            ``<path>.<digits>.data``.
        input_shape: of one sample, (C, H, W); by default the one that the network was built for.
        opset: the version of ONNX's operators, 13 to 28 (and to what the installed ``onnx`` knows).
        dynamic_batch: take batches of any size; else of 1.
        dtype: what the file computes in, "float32" or "float64", by default the network's own; or
            "float16" or "bfloat16": weights of two or more axes are stored so, which halves the
            file, and everything is computed in float32.
        preprocess: take images of uint8, and begin with what ``model.preprocess`` does to them.

    Raises:
        DependencyError: without the package ``onnx``.
        StateError: the network is not built and there is no ``input_shape``; it has no
            ``preprocess`` to include.
        ShapeError: a network built for other samples does not take ``input_shape`` with the weights
            it has.
        ArgumentError: an opset out of range, an unknown dtype, a weight too large for it; a layer
            that nobody has said how to write (see ``portacnn.onnx.emitter``).
        OSError: the file cannot be written; what was there before is there still.
    """
    onnx, target = onnx_library(), link_target(file_path(path, "an ONNX file"))
    newest = min(NEWEST, onnx.defs.onnx_opset_version())
    try:
        if not OLDEST <= whole("opset", opset, 1) <= newest:
            raise ArgumentError(
                f"opset must be {OLDEST} to {newest} with onnx {onnx.__version__}, got {opset}"
            )
        if dtype is not None:
            one_of("dtype", dtype, *_DTYPES)
    except PortacnnError as error:
        raise error.at("onnx.export")
    if model.backend is None:
        if input_shape is None:
            raise StateError(
                "not built yet: give input_shape, or call build(input_shape) first", model.where
            )
        model.build(input_shape)
    with model.planned(model.input_shape if input_shape is None else input_shape):
        _check_weights(model)
        graph = _graph(model, opset, dtype or model.dtype, preprocess)
        proto = _model_proto(
            onnx, graph, model, dynamic_batch, "uint8" if preprocess else graph.dtype
        )
    _check(onnx, proto, graph)
    _write(onnx, proto, list(graph.initializers.values()), target)


def _check_weights(model: Layer) -> None:
    """Raise ShapeError unless the weights are those that the samples it is planned for ask for."""
    for layer in model.walk():
        for name, declared in (layer.declared | layer.declared_buffers).items():
            own = layer.params if name in layer.declared else layer.buffers
            if name not in own or tuple(own[name].shape) != tuple(declared.shape):
                has = f"is {tuple(own[name].shape)}" if name in own else "is not there"
                raise ShapeError(
                    f"for samples {model.input_shape} {name} would have to be "
                    f"{tuple(declared.shape)}, and {has}; "
                    "leave input_shape out, or build the network for it",
                    layer.where,
                )


def _graph(model: Layer, opset: int, dtype: str, preprocess: bool) -> GraphBuilder:
    """All nodes and weights. The last node's output is called ``OUTPUT``."""
    halves = dtype in ("float16", "bfloat16")
    graph = GraphBuilder(opset, "float32" if halves else dtype, dtype if halves else None)
    x = graph.fresh(INPUT)
    graph.fresh(OUTPUT)
    y = graph.layer(model, _preprocessed(graph, model, x) if preprocess else x)
    if not graph.nodes or y != graph.nodes[-1].name:
        y = graph.add("Identity", [y])
    graph.nodes[-1].output[0] = OUTPUT
    return graph


def _preprocessed(graph: GraphBuilder, model: Any, x: str) -> str:
    """(pixels - mean) / std, with both in units of the pixels, as ``Model.batch`` computes it."""
    normalize = getattr(model, "preprocess", None)
    if normalize is None:
        raise StateError(
            "has no preprocess to include; set model.preprocess = portacnn.Normalize(...)",
            model.where,
        )
    channels, *size = model.input_shape
    mean, std = normalize.in_pixels(channels)
    shape = (channels, *(1 for _ in size))
    with graph.scope("preprocess"):
        y = graph.add("Cast", [x], to=CODES[graph.dtype])
        if any(mean):
            y = graph.add("Sub", [y, graph.constant(mean, shape)])
        return graph.add("Div", [y, graph.constant(std, shape)])


def _model_proto(
    onnx: Any, graph: GraphBuilder, model: Layer, dynamic_batch: bool, taken: str
) -> Any:
    """The model but for its weights."""
    helper, batch = onnx.helper, BATCH if dynamic_batch else 1
    given = helper.make_tensor_value_info(INPUT, CODES[taken], [batch, *model.input_shape])
    made = helper.make_tensor_value_info(OUTPUT, CODES[graph.dtype], [batch, *model.output_shape])
    opsets = [helper.make_opsetid("", graph.opset)]
    return helper.make_model(
        helper.make_graph(graph.nodes, type(model).__name__, [given], [made]),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="portacnn",
    )


def _check(onnx: Any, proto: Any, graph: GraphBuilder) -> None:
    """Raise ModelFormatError unless this is a valid graph. Weights stand in it as inputs: their
    bytes say nothing here."""
    light = onnx.ModelProto()
    light.CopyFrom(proto)
    for tensor in graph.initializers.values():
        code = CODES[tensor.dtype]
        light.graph.input.append(
            onnx.helper.make_tensor_value_info(tensor.name, code, tensor.shape)
        )
    try:
        onnx.checker.check_model(light, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelFormatError(
            f"the graph would not be valid ONNX: {error}", "onnx.export"
        ) from error


# --- the files ------------------------------------------------------------------------------------


def _write(onnx: Any, proto: Any, tensors: Sequence[Stored], path: Path) -> None:
    """Put the weights in, and write it all; the file that ``path`` names comes last, so it never
    names what is not there."""
    beside = [tensor for tensor in tensors if tensor.size > _SMALL]
    if sum(tensor.size for tensor in tensors) <= _INLINE:
        beside = []
    data = None
    if beside:
        digest = blake2b(digest_size=8)
        for piece in _pieces(beside):
            digest.update(piece)
        # Never a name that an older file has for other weights.
        data = path.with_name(f"{beginning(path.name, _LONGEST_PREFIX)}.{digest.hexdigest()}.data")
    start, outside = 0, {tensor.name for tensor in beside}
    for tensor in tensors:
        entry = proto.graph.initializer.add(
            name=tensor.name, dims=tensor.shape, data_type=CODES[tensor.dtype]
        )
        if data is None or tensor.name not in outside:
            entry.raw_data = tensor.content()
            continue
        entry.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", data.name), ("offset", start), ("length", tensor.size)):
            entry.external_data.add(key=key, value=str(value))
        start += tensor.size + -tensor.size % _PAGE
    content = proto.SerializeToString()
    fresh = data is not None and not data.exists()
    if data is not None:
        write_atomically(data, _pieces(beside))
    try:
        write_atomically(path, content)
    except BaseException:
        if data is not None and fresh:
            with contextlib.suppress(OSError):
                data.unlink()
        raise
    _forget_older(path, data)


def _pieces(tensors: Iterable[Stored]) -> Iterator[bytes]:
    """The second file: the arrays, each filled up to whole pages."""
    for tensor in tensors:
        yield tensor.content()
        yield bytes(-tensor.size % _PAGE)


def _forget_older(path: Path, kept: Path | None) -> None:
    """Remove the second files of earlier exports to the same path, which nothing names any more."""
    pattern = re.compile(re.escape(beginning(path.name, _LONGEST_PREFIX)) + r"\.[0-9a-f]{16}\.data")
    for other in path.parent.iterdir():
        if other != kept and pattern.fullmatch(other.name):
            with contextlib.suppress(OSError):
                other.unlink()
