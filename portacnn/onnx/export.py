"""``export``: write a network as an ONNX file, for inference with other tools.

The layers are visited in their order, and each is written into the graph by its emitter
(``builder``, ``layers``). The file takes samples as the network does and returns what ``predict``
returns. It is checked before it is written, and written atomically. A protocol buffer is limited to
2 GB: larger weights are stored in a second file in the same folder, which the first one names.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import portacnn.onnx.layers  # noqa: F401 (registers the emitters of portacnn's own layers)
from portacnn.arguments import answering_keywords, one_of, whole
from portacnn.errors import ArgumentError, ModelFormatError, PortacnnError, ShapeError, StateError
from portacnn.files import beginning, file_path, link_target, write_atomically
from portacnn.layers import Layer
from portacnn.layers.base import Shape
from portacnn.models import Model
from portacnn.onnx.about import about
from portacnn.onnx.builder import CODES, GraphBuilder, Stored
from portacnn.onnx.library import onnx_library
from portacnn.onnx.quantizing import QuantizedGraph, calibrate, check_quantize
from portacnn.onnx.several import joined_inputs, split_outputs
from portacnn.onnx.wire import METADATA
from portacnn.version import VERSION

OLDEST, NEWEST = 13, 28
"""The oldest and the newest opset that can be written."""
INPUT, OUTPUT, BATCH = "input", "output", "N"
_DTYPES = ("float32", "float64", "float16", "bfloat16")
_INLINE = (1 << 31) - (64 << 20)  # bytes of weights in one file; the rest is for the graph
_SMALL = 1024  # bytes up to which an array stays in the graph's file
# bytes of the first file's name kept in the second's, so that the name fits into 255
_LONGEST_PREFIX = 200
# each array in the second file starts at a multiple, so that it can be mapped into memory
_PAGE = 4096


@answering_keywords("onnx.export")
def export(
    model: Layer,
    path: str | os.PathLike[str],
    *,
    input_shape: Sequence[int] | None = None,
    opset: int = 18,
    dynamic_batch: bool = True,
    dtype: str | None = None,
    preprocess: bool = False,
    quantize: str | None = None,
    calibration: Any = None,
) -> None:
    """Write a network, or any layer, as an ONNX file that computes its ``forward`` outside
    training.

    The graph's input is named "input" and its output "output"; a network with several (from
    ``load``) keeps their names. Initializers have their parameters' paths, nodes their layers'
    ("layer1.0.conv1/Conv").

        import portacnn
        portacnn.onnx.export(model, "model.onnx")
        again = portacnn.onnx.load("model.onnx", device="cpu")

    Args:
        model: a built model, on any backend. One that is not built is built for ``input_shape``,
            with new weights.
        path: of the file. More than 2 GB of weights are stored in a second file,
            ``<path>.<digits>.data``.
        input_shape: (C, H, W) of one sample; default: the shape that the network was built for.
        opset: version of ONNX's operators, 13 to 28 (and not above the installed ``onnx``'s).
        dynamic_batch: accept batches of any size; otherwise only of 1.
        dtype: dtype of the computation, "float32" or "float64"; default: the network's. With
            "float16" or "bfloat16", weights of two or more axes are stored in that dtype, which
            halves the file, and the computation is in float32.
        preprocess: take uint8 images, and apply ``model.preprocess`` to them first.
        quantize: "int8" stores the weights of convolutions and linear layers as int8, which makes
            the file a quarter as large, and quantizes their inputs (QuantizeLinear and
            DequantizeLinear nodes).
        calibration: samples as ``predict`` takes them, for ``quantize``: the range of the values at
            each layer is that for these. A few hundred of the training set are enough.

    Raises:
        DependencyError: if the package ``onnx`` is not installed.
        StateError: if the network is not built and there is no ``input_shape``, or it has no
            ``preprocess`` to include.
        ShapeError: if a built network cannot take ``input_shape`` with its weights.
        ArgumentError: if an argument is out of range, a weight overflows the dtype, or a layer has
            no emitter (see ``portacnn.onnx.emitter``).
        OSError: if the file cannot be written. The old file is unchanged.
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
        check_quantize(quantize, calibration, dtype or model.dtype)
    except PortacnnError as error:
        raise error.at("onnx.export")
    if model.backend is None:
        if input_shape is None:
            raise StateError(
                "the network is not built; pass input_shape, or call build(input_shape) first",
                model.where,
            )
        model.build(input_shape)
    with model.planned(model.input_shape if input_shape is None else input_shape):
        _check_weights(model)
        graph = _graph(model, opset, dtype or model.dtype, preprocess, calibration)
        proto = _model_proto(
            onnx, graph, model, dynamic_batch, "uint8" if preprocess else graph.dtype
        )
    _check(onnx, proto, graph)
    _write(onnx, proto, list(graph.initializers.values()), target)


def _check_weights(model: Layer) -> None:
    """Raise ShapeError if the weights do not have the shapes that the planned samples require."""
    for layer in model.walk():
        for name, declared in (layer.declared | layer.declared_buffers).items():
            own = layer.params if name in layer.declared else layer.buffers
            if name not in own or tuple(own[name].shape) != tuple(declared.shape):
                has = f"has {tuple(own[name].shape)}" if name in own else "is missing"
                raise ShapeError(
                    f"for samples {model.input_shape} {name} must have shape "
                    f"{tuple(declared.shape)}, but it {has}; omit input_shape, or build the "
                    "network for it",
                    layer.where,
                )


def _graph(
    model: Layer, opset: int, dtype: str, preprocess: bool, calibration: Any
) -> GraphBuilder:
    """Return the graph with all nodes and weights. Its inputs and outputs have the names of
    ``_inputs`` and ``_outputs``."""
    halves = dtype in ("float16", "bfloat16")
    graph = GraphBuilder(opset, "float32" if halves else dtype, dtype if halves else None)
    if calibration is not None:
        span, spans = calibrate(model, calibration)
        graph = QuantizedGraph(opset, spans)
    inputs, outputs = _inputs(model), _outputs(model)
    for name in (*inputs, *outputs):
        graph.fresh(name)
    x = INPUT if len(inputs) == 1 else joined_inputs(graph, [*inputs])
    x = _preprocessed(graph, model, x) if preprocess else x
    if isinstance(graph, QuantizedGraph):
        graph.spans(x, span)
    y = graph.layer(model, x)
    if len(outputs) > 1:
        split_outputs(graph, y, outputs)
        return graph
    if not graph.nodes or y != graph.nodes[-1].name:
        y = graph.add("Identity", [y])
    graph.nodes[-1].output[0] = OUTPUT
    return graph


def _inputs(model: Layer) -> dict[str, Shape]:
    """Return the shapes of samples by the input's name in the file."""
    return getattr(model, "input_shapes", {}) or {INPUT: model.input_shape}


def _outputs(model: Layer) -> dict[str, Shape]:
    """Return the shapes of a sample's outputs by their names in the file."""
    return getattr(model, "output_shapes", {}) or {OUTPUT: model.output_shape}


def _preprocessed(graph: GraphBuilder, model: Any, x: str) -> str:
    """Add (pixels - mean) / std, in units of the pixels, as ``Model.batch`` computes it."""
    normalize = getattr(model, "preprocess", None)
    if normalize is None:
        raise StateError(
            "there is no preprocess to include; set model.preprocess = portacnn.Normalize(...)",
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
    """Return the model without its weights."""
    helper, batch = onnx.helper, BATCH if dynamic_batch else 1
    given, made = (
        [
            helper.make_tensor_value_info(name, CODES[dtype], [batch, *shape])
            for name, shape in shapes.items()
        ]
        for shapes, dtype in ((_inputs(model), taken), (_outputs(model), graph.dtype))
    )
    opsets = [helper.make_opsetid("", graph.opset)]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, type(model).__name__, given, made),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="portacnn",
        producer_version=VERSION,
    )
    if isinstance(model, Model):
        known = {METADATA: json.dumps(about(model), ensure_ascii=False)}
        helper.set_model_props(proto, known)
    return proto


def _check(onnx: Any, proto: Any, graph: GraphBuilder) -> None:
    """Raise ModelFormatError if the graph is not valid.

    Weights are declared as inputs here: their values do not matter.
    """
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
    """Add the weights and write the files. The file at ``path`` is last, so it never names a
    missing file."""
    beside = [tensor for tensor in tensors if tensor.size > _SMALL]
    if sum(tensor.size for tensor in tensors) <= _INLINE:
        beside = []
    data = None
    if beside:
        digest = blake2b(digest_size=8)
        for piece in _pieces(beside):
            digest.update(piece)
        # A name that no older file uses for other weights.
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
    """Yield the second file: the arrays, each padded to whole pages."""
    for tensor in tensors:
        yield tensor.content()
        yield bytes(-tensor.size % _PAGE)


def _forget_older(path: Path, kept: Path | None) -> None:
    """Remove the second files of earlier exports to the same path. No file refers to them."""
    pattern = re.compile(re.escape(beginning(path.name, _LONGEST_PREFIX)) + r"\.[0-9a-f]{16}\.data")
    for other in path.parent.iterdir():
        if other != kept and pattern.fullmatch(other.name):
            with contextlib.suppress(OSError):
                other.unlink()
