"""``load``: read an ONNX file as a portacnn model, which predicts and trains."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import portacnn.onnx.layers  # noqa: F401 (registers the converters of all operators)
from portacnn.arguments import answering_keywords, whole
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.files import file_path
from portacnn.layers import Reshape
from portacnn.layers.base import Shape
from portacnn.layers.building import building_from
from portacnn.layers.graph import Node
from portacnn.layers.limits import limited
from portacnn.models.files import NONSENSE
from portacnn.models.graph_model import GraphModel
from portacnn.onnx.about import tell
from portacnn.onnx.importer import OPERATORS, Importer, Value, run, shared, unmade
from portacnn.onnx.reading import (
    FLOATS,
    MAX_EXTRA_BYTES,
    TYPES,
    Operation,
    Source,
    brief,
    read_source,
)
from portacnn.onnx.wire import MOST, ValueInfo
from portacnn.runtime import Backend, HostArray, resolve
from portacnn.seeds import check_seed
from portacnn.text import listed, quoted

_log = logging.getLogger("portacnn.onnx")


@answering_keywords("onnx.load")
def load(
    path: str | os.PathLike[str],
    *,
    device: str | Backend | None = None,
    dtype: str | None = None,
    input_shape: Sequence[int] | None = None,
    seed: int | None = None,
    max_extra_bytes: int = MAX_EXTRA_BYTES,
) -> GraphModel:
    """Return the model in an ONNX file, with its weights, on ``device``, for prediction and
    training.

    The network must have one input (N, *S) and one output. Every operator must be supported
    (docs/onnx.md), and samples of a batch must not affect each other. The batch size of the file is
    ignored. Weights become parameters, batch norm's statistics become buffers. An initializer used
    by several nodes is one parameter: equal nodes share one layer, others are tied (``Layer.tie``).
    A constant that is added, subtracted, multiplied or divided by is a parameter if it is an
    initializer with more than one element.

        import portacnn
        model = portacnn.onnx.load("model.onnx", device="cpu")
        model.predict(images)

    Args:
        path: the file. Its external data are in the same folder or below.
        device: see ``portacnn.resolve``.
        dtype: "float32" or "float64"; default: float64 if the file's input is float64, else
            float32.
        input_shape: of one sample, for files that do not state it.
        seed: seed of dropout in training; None draws one.
        max_extra_bytes: memory limit of the arrays, in bytes, in addition to four times the size of
            the files. Increase it only for files that you trust and that expand small data to large
            constants.

    Raises:
        ModelFormatError: if the file is not an ONNX model or is damaged, or if an operator or its
            use is not supported (the message names the node and what is supported).
        ArgumentError, BackendError: if another argument is invalid.
        OSError: if there is no such file.
    """
    backend, path = resolve(device), file_path(path, "an ONNX file")
    if dtype not in (None, "float32", "float64"):
        raise ArgumentError(f'dtype must be "float32" or "float64", got {dtype!r}')
    whole("max_extra_bytes", max_extra_bytes, 0), check_seed(seed)
    given = None if input_shape is None else tuple(whole("input_shape", n, 1) for n in input_shape)
    try:
        with np.errstate(all="ignore"):
            return _load(path, backend, dtype, given, seed, max_extra_bytes)
    except ModelFormatError as error:
        raise ModelFormatError(str(error), str(path)) from error.__cause__
    except NONSENSE as error:
        raise ModelFormatError(
            f"its parts do not match: {type(error).__name__}: {error}", str(path)
        ) from error


def _load(
    path: Path,
    backend: Backend,
    dtype: str | None,
    given: Shape | None,
    seed: int | None,
    max_extra_bytes: int,
) -> GraphModel:
    with read_source(path, max_extra_bytes) as source, limited(MOST):
        model, state, info, sample = _model(source, given)
        told = source.metadata
    dtype = dtype or ("float64" if FLOATS.get(info.elem_type) == "float64" else "float32")
    with building_from(state):
        model.build(sample, device=backend, dtype=dtype, seed=seed)
    if told is not None:
        tell(model, told)
    return model


def _model(
    source: Source, given: Shape | None
) -> tuple[GraphModel, dict[str, HostArray], ValueInfo, Shape]:
    """Return the network that a file describes, not built yet; its state; its input; the shape of
    one sample."""
    if len(source.outputs) != 1:
        raise ModelFormatError(
            f"expected a graph with one output, got {', '.join(map(quoted, source.outputs[:16]))}"
        )
    needed, asked = _needed(source)
    info = _input(source, asked)
    sample, batch = _sample(info, given)
    importer = Importer(source, sample, batch)
    importer.values[info.name] = importer.input
    for op in needed:
        run(importer, op, OPERATORS[op.kind])
        for name in op.outputs:
            if name and name in asked and name not in importer.values:
                raise unmade(op, name)
    output = importer.values.get(source.outputs[0])
    if not isinstance(output, Value):
        raise ModelFormatError(
            f"the output {quoted(source.outputs[0])} does not depend on the input"
        )
    nodes, several = shared(_leading_to(output, importer), importer)
    for name, users in several.items():
        _log.warning(
            "%s: %s is used in different forms by %s; each of them now has its own parameter",
            source.path,
            quoted(name),
            listed(users, 8),
        )
    for note, about in importer.notes.items():
        _log.warning("%s: %s: %s", source.path, note, listed(about, 8))
    # a layer's state is stored under its first node's name
    first = {id(node.layer): node for node in reversed(nodes)}
    state = {
        f"{node.name}.{key}": importer.state[f"{node.name}.{key}"]
        for node in first.values()
        for key in importer.made.get(node.name, {})
        if key not in node.layer.tied
    }
    return GraphModel(*nodes), state, info, sample


def _needed(source: Source) -> tuple[list[Operation], set[str]]:
    """Return the operations that the output depends on, in order, and the names of all values they
    use."""
    asked, needed = set(source.outputs), []
    for op in reversed(source.operations):
        if asked.isdisjoint(op.outputs):
            continue
        if op.kind not in OPERATORS:
            raise op.wrong(
                f"the operator {quoted(op.kind)} is not supported; supported are: "
                f"{', '.join(sorted(OPERATORS))}"
            )
        needed.append(op)
        asked.update(name for name in op.inputs if name)
    return needed[::-1], asked


def _input(source: Source, asked: set[str]) -> ValueInfo:
    """Return the only input of the network."""
    found = [info for name, info in source.inputs.items() if name in asked]
    if len(found) != 1:
        names = ", ".join(quoted(info.name) for info in found[:16]) or "none"
        raise ModelFormatError(
            f"expected a graph with one input that is not an initializer, got {names}"
        )
    if found[0].elem_type not in FLOATS:
        kind = TYPES.get(found[0].elem_type)
        what = f"data type {found[0].elem_type}" + (f" ({kind.name})" if kind else "")
        advice = (
            "; export it without preprocess=True, and set model.preprocess here"
            if kind and kind.name == "uint8"
            else ""
        )
        raise ModelFormatError(
            f"its input {quoted(found[0].name)} must be one of {', '.join(FLOATS.values())}, got "
            f"{what}{advice}"
        )
    return found[0]


def _sample(info: ValueInfo, given: Shape | None) -> tuple[Shape, int | None]:
    """Return the shape of one sample, and the batch size that the file was exported for."""
    dims = info.dims
    if given is not None and (dims is None or len(dims) == len(given) + 1):
        fits = dims is None or all(
            d in (None, n) or d < 1 for d, n in zip(dims[1:], given, strict=True)
        )
    else:
        fits = given is None
    if not fits:
        raise ModelFormatError(
            f"input_shape={given} does not match the file's input, {brief(dims or [])}"
        )
    shape = given if given is not None else tuple((dims or [])[1:])
    if not shape and dims:
        raise ModelFormatError(
            f"its input {quoted(info.name)} must be (N, *S), but has only the batch axis"
        )
    if not shape or any(n is None or n < 1 for n in shape):
        raise ModelFormatError(
            f"its input {quoted(info.name)} is {brief(dims or [])}, which does not state a "
            "sample's shape; pass it: load(..., input_shape=(3, 224, 224))"
        )
    batch = dims[0] if dims else None
    return shape, batch if batch is not None and batch > 0 else None  # type: ignore[return-value]


def _leading_to(output: Value, importer: Importer) -> list[Node]:
    """Return the nodes that the output depends on; other nodes only supplied shapes."""
    if output.node == importer.input.node:
        importer.nodes.append(Node("identity", Reshape(output.shape), (output.node,)))
        output = Value("identity", output.shape)
    wanted, found = {output.node}, []
    for node in reversed(importer.nodes):
        if node.name in wanted:
            found.append(node)
            wanted.update(node.inputs)
    return found[::-1]
