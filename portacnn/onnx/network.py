"""Make the network that a file describes: choose outputs, check inputs, convert all operations."""

import logging
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import portacnn.onnx.layers  # noqa: F401 (registers the converters of all operators)
from portacnn import layers as L
from portacnn.errors import ArgumentError, ModelFormatError
from portacnn.layers.base import Shape
from portacnn.models.graph_model import GraphModel
from portacnn.onnx.converting import run
from portacnn.onnx.importer import Importer, unmade
from portacnn.onnx.reading import FLOATS, TYPES, Operation, Source, brief
from portacnn.onnx.sharing import shared
from portacnn.onnx.supported import check_supported, needed
from portacnn.onnx.values import Value
from portacnn.onnx.wire import ValueInfo
from portacnn.runtime import HostArray
from portacnn.text import listed, quoted

_log = logging.getLogger("portacnn.onnx")

LOAD = "onnx.load"
"""Where the errors of the caller's arguments come from."""


class Network(NamedTuple):
    """A network that is not built yet, and what it is built from."""

    model: GraphModel
    state: dict[str, HostArray]
    sample: Shape
    dtype: str


def network(
    source: Source,
    shapes: Mapping[str, Shape],
    chosen: Sequence[str] | None,
    dtype: str | None,
    learn_constants: bool,
) -> Network:
    """Return the network in a file. See ``load`` for the arguments."""
    names = _outputs(source, chosen)
    operations, asked = needed(source.operations, names)
    check_supported(operations, source.inputs)
    infos = _inputs(source, asked)
    samples, batch = _samples(infos, shapes)
    wide = any(FLOATS.get(info.elem_type) == "float64" for info in infos)
    sample = samples[0] if len(samples) == 1 else (sum(map(prod, samples)),)
    at = Importer(source, sample, batch, "float64" if wide else "float32", learn_constants)
    _enter_inputs(at, [info.name for info in infos], samples)
    for op in operations:
        run(at, op)
        for name in op.outputs:
            if name and name in asked and name not in {*at.values, *at.sequences}:
                raise unmade(op, name)
    values = [_output(at, name) for name in names]
    last = values[0] if len(values) == 1 else _joined(at, values)
    nodes, several = shared(at.leading_to(last), at)
    for name, users in several.items():
        _log.warning(
            "%s: %s is used in different forms by %s; each of them now has its own parameter",
            source.path,
            quoted(name),
            listed(users, 8),
        )
    for note, about in at.notes.items():
        _log.warning("%s: %s: %s", source.path, note, listed(about, 8))
    model = GraphModel(
        *nodes,
        inputs=[(i.name, s) for i, s in zip(infos, samples, strict=True)] if infos[1:] else [],
        outputs=[(n, v.shape) for n, v in zip(names, values, strict=True)] if names[1:] else [],
    )
    return Network(model, at.state_of(nodes), sample, dtype or str(at.dtype))


# --- outputs --------------------------------------------------------------------------------------


def _outputs(source: Source, chosen: Sequence[str] | None) -> list[str]:
    """Return the names of the outputs to compute."""
    if chosen is None:
        return list(dict.fromkeys(source.outputs))
    if not chosen or len(set(chosen)) != len(chosen):
        raise ArgumentError(
            f"outputs must be one or more different names, got {chosen!r:.200}", LOAD
        )
    if missing := [name for name in chosen if name not in source.outputs]:
        raise ArgumentError(
            f"outputs: the file has no output {missing[0]!r:.200}; it has {listed(source.outputs)}",
            LOAD,
        )
    return list(chosen)


def _output(at: Importer, name: str) -> Value:
    value = at.values.get(name)
    if not isinstance(value, Value):
        raise ModelFormatError(f"the output {quoted(name)} does not depend on the input")
    if value.rows > 1:
        raise ModelFormatError(
            f"the output {quoted(name)} is {value.described()}: it has other axes merged with the "
            "batch; expected one sample for each input"
        )
    if value.at and at.batch != 1:
        raise ModelFormatError(
            f"the output {quoted(name)} is {value.described()}, with the batch at axis {value.at}; "
            "expected it at axis 0"
        )
    value = value._replace(at=0)
    if value.node == at.input.node:
        value = at.add(Operation("", "Identity", [], [name], {}), L.Reshape(value.shape), value)
    return value


def _joined(at: Importer, values: Sequence[Value]) -> Value:
    """Return all outputs in one row for each sample."""
    op = Operation("outputs", "Concat", [], ["outputs"], {})
    flat = [at.reshaped(op, value, (prod(value.shape),)) for value in values]
    return at.add(op, L.Concat(1), *flat)


# --- inputs ---------------------------------------------------------------------------------------


def _inputs(source: Source, asked: set[str]) -> list[ValueInfo]:
    """Return the inputs of the network."""
    found = [info for name, info in source.inputs.items() if name in asked]
    if not found:
        raise ModelFormatError("expected a graph with an input that is not an initializer")
    for info in found:
        if info.elem_type in FLOATS:
            continue
        kind = TYPES.get(info.elem_type)
        what = f"data type {info.elem_type}" + (f" ({kind.name})" if kind else "")
        advice = (
            "; export it without preprocess=True, and set model.preprocess here"
            if kind and kind.name == "uint8"
            else ""
        )
        raise ModelFormatError(
            f"its input {quoted(info.name)} must be one of {', '.join(FLOATS.values())}, got "
            f"{what}{advice}"
        )
    return found


def _samples(
    infos: Sequence[ValueInfo], shapes: Mapping[str, Shape]
) -> tuple[list[Shape], int | None]:
    """Return the shape of one sample of each input, and the batch size that the file was exported
    for."""
    if "" in shapes and len(infos) > 1:
        raise ArgumentError(
            "input_shape must be a dictionary of the shapes of "
            f"{listed([info.name for info in infos])}, as there are several inputs",
            LOAD,
        )
    names = {info.name for info in infos} | {""}
    if unknown := [name for name in shapes if name not in names]:
        raise ArgumentError(f"input_shape: the network has no input {unknown[0]!r:.200}", LOAD)
    found = [
        _sample(info, shapes.get(info.name, shapes.get("") if len(infos) == 1 else None))
        for info in infos
    ]
    batches = {batch for _, batch in found}
    if len(batches - {None}) > 1:
        raise ModelFormatError(
            f"its inputs {listed([info.name for info in infos])} are for different numbers of "
            "samples; expected the batch as axis 0 of each"
        )
    return [shape for shape, _ in found], None if None in batches else batches.pop()


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


def _enter_inputs(at: Importer, names: Sequence[str], samples: Sequence[Shape]) -> None:
    """Make the inputs values. Several are parts of one row for each sample."""
    if len(names) == 1:
        at.values[names[0]] = at.input
        return
    first = 0
    for name, shape in zip(names, samples, strict=True):
        op = Operation(name, "Input", [], [name], {})
        last = first + prod(shape)
        part = at.add(op, L.Slice([first], [last], [1]), at.input)
        at.values[name] = at.reshaped(op, part, shape)
        first = last
