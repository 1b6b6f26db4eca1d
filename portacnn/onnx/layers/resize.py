"""Layers that change the image size: interpolation, pixel shuffle and pixel unshuffle."""

from fractions import Fraction
from math import floor
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.errors import ArgumentError
from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.importer import BATCH, Importer, Value, operator, plain_axes
from portacnn.onnx.reading import Operation, brief
from portacnn.ops.resize import COORDINATES, ROUNDING, convention, sizes_of

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@emitter(L.Upsample)
def write_upsample(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write scales if float32 represents them exactly; otherwise write sizes, to avoid rounding
    errors."""
    axes = sizes_of(layer.input_shape[1:], layer.size, layer.scale_factor, layer.mode)
    scales = [np.float32(1.0 if ratio is None else float(1 / ratio)) for *_, ratio in axes]
    place = convention(layer.mode, layer.align_corners, layer.coordinates)
    align = place == "align_corners"
    # With align_corners, ONNX divides by n * scale - 1, which must be a whole number.
    exact = [
        ratio is not None and Fraction(float(scale)) == 1 / ratio and (not align or n / ratio == m)
        for scale, (n, m, ratio) in zip(scales, axes, strict=True)
    ]
    by_size = [ratio is None or align or ratio == Fraction(n, m) for n, m, ratio in axes]
    how: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": place}
    if layer.mode == "nearest":
        how |= {"mode": "nearest", "nearest_mode": layer.rounding or "floor"}
    if graph.opset < 11:
        raise ArgumentError(f"interpolation needs opset 11 or newer, got {graph.opset}")
    if not all(exact) and all(by_size):
        count = graph.add(
            "Slice",
            [
                graph.add("Shape", [x]),
                *(graph.constant([n], dtype="int64") for n in (0, 1)),
            ],
        )
        sizes = graph.constant(list(layer.output_shape), dtype="int64")
        return graph.add("Resize", [x, "", "", graph.add("Concat", [count, sizes], axis=0)], **how)
    made = [int(np.floor(np.float32(n) * s)) for (n, *_), s in zip(axes, scales, strict=True)]
    if made != [m for _, m, _ in axes]:
        raise ArgumentError(
            f"scale_factor {layer.scale_factor!r} is rounded to float32 in ONNX, which results in "
            f"size {made} instead of {[m for _, m, _ in axes]}; use size instead"
        )
    factors = graph.constant([1.0, 1.0, *map(float, scales)], dtype="float32")
    return graph.add("Resize", [x, "", factors], **how)


@operator("Resize", "Upsample")
def read_resize(at: Importer, op: Operation) -> Any:
    """Read an interpolation of any axes but the batch. An axis that is not spatial in portacnn is
    made so by a reshape."""
    x, mode = at.value(op), op.word("mode", "nearest")
    if mode not in ("nearest", "linear"):
        raise op.wrong(f"mode must be nearest or linear, got {mode[:40]!r}")
    old = op.kind == "Upsample" or at.opset < 11  # no coordinate_transformation_mode
    place = "asymmetric" if old else op.word("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else op.word("nearest_mode", "round_prefer_floor")
    op.ignore("cubic_coeff_a", "exclude_outside", "extrapolation_value")
    if op.whole("antialias", 0) or op.word("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise op.wrong("antialias and keep_aspect_ratio_policy are not supported")
    if place not in COORDINATES or rounding not in ROUNDING:
        raise op.wrong(
            f"{place[:40]!r} with {rounding[:40]!r} is not supported; expected one of "
            f"{', '.join(COORDINATES)}, and of {', '.join(ROUNDING)}"
        )
    axes = _axes(at, op, x, old)
    same = [n == m and scale in (None, 1.0) for n, m, scale in axes]
    if all(same):
        return x
    if place == "align_corners" and any(
        scale is not None and not (n * scale).is_integer() for n, _, scale in axes
    ):
        raise op.wrong("'align_corners' is not supported for scales with a fractional output size")
    inner = x.shape
    if x.rank == 2 or not same[0]:
        inner = (1, *inner)
    axes = axes[len(x.shape) - len(inner) + 1 :]
    if len(axes) > 3:
        raise op.wrong(f"expected at most 3 axes to resize, got samples {brief(x.shape)}")
    scales = [scale for *_, scale in axes]
    how: dict[str, Any] = {"mode": "nearest", "rounding": rounding}
    if mode == "linear":
        how = {"mode": _LINEAR[len(axes)]}
    elif at.opset == 10 and op.kind == "Resize" and any(n > m for n, m, _ in axes):
        how["rounding"] = "ceil"  # as onnxruntime does
        if any(n < m for n, m, _ in axes):
            raise op.wrong("before opset 11, one axis that grows and one that shrinks")
    if None in scales:
        layer = L.Upsample([m for _, m, _ in axes], coordinates=place, **how)
    else:
        layer = L.Upsample(None, scales, coordinates=place, **how)  # type: ignore[arg-type]
    y = at.add(op, layer, at.reshaped(op, x, inner))
    return at.reshaped(op, y, y.shape[len(inner) - len(x.shape) :])


_Axes = list[tuple[int, int, float | None]]


def _axes(at: Importer, op: Operation, x: Value, old: bool) -> _Axes:
    """Return for every axis of a sample its size in and out, and its scale; None if the file states
    sizes."""
    given = op.ints("axes")
    chosen = list(range(x.rank)) if given is None else plain_axes(op, given, x.rank)
    sizes = None if old else at.numbers(op, 3)
    scales = None if sizes else _scales(at, op, old)
    rows = sizes or scales or []
    if len(rows) != len(chosen):
        raise op.wrong(f"expected {len(chosen)} scales or sizes, got {brief(rows)}")
    found: _Axes = [(n, n, None if sizes else 1.0) for n in x.shape]
    for number, axis in enumerate(chosen):
        if axis == 0:
            keeps = sizes[number] in (BATCH, at.batch) if sizes else rows[number] == 1.0
            if not keeps:
                raise op.wrong(f"sizes or scales {brief(rows)} resize the batch (axis 0)")
        elif sizes:
            if not 1 <= sizes[number] < 1 << 31:
                raise op.wrong(f"sizes must be at least 1, got {brief(sizes)}")
            found[axis - 1] = (x.shape[axis - 1], sizes[number], None)
        else:
            n, scale = x.shape[axis - 1], float(rows[number])
            found[axis - 1] = (n, floor(n * scale), scale)
    return found


def _scales(at: Importer, op: Operation, old: bool) -> list[float] | None:
    if op.has("scales"):  # before opset 9
        scales = op.any_of(("scales", "floats"))[1]  # type: ignore[index]
    else:
        known = at.known(op, 1 if old else 2)
        if known is None or not 0 < known.array.size <= 16 or known.array.dtype.kind != "f":
            return None
        scales = known.array.reshape(-1)
    # Read float32 with its shortest decimal digits: 1.1, not 1.10000002.
    scales = [float(str(np.float32(n))) for n in scales]
    if not all(0.0 < n < 1 << 20 for n in scales):
        raise op.wrong(f"scales must be above 0, got {brief(scales)}")
    return scales


@emitter(L.PixelShuffle)
def write_pixel_shuffle(graph: GraphBuilder, layer: Any, x: str) -> str:
    return graph.add("DepthToSpace", [x], blocksize=layer.upscale_factor, mode="CRD")


@emitter(L.PixelUnshuffle)
def write_pixel_unshuffle(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write SpaceToDepth, then a permutation: ONNX orders the channels by block position."""
    r, channels = layer.downscale_factor, layer.input_shape[0]
    y = graph.add("SpaceToDepth", [x], blocksize=r)
    order = [k * channels + c for c in range(channels) for k in range(r * r)]
    return graph.add("Gather", [y, graph.constant(order, dtype="int64")], axis=1)


@operator("DepthToSpace")
def read_depth_to_space(at: Importer, op: Operation) -> Value:
    x, r, mode = at.value(op), op.whole("blocksize", 0), op.word("mode", "DCR")
    if x.rank != 4 or r < 1 or x.shape[0] % r**2 or mode not in ("DCR", "CRD"):
        raise op.wrong(
            f"blocksize {r} with mode {mode[:40]!r} is not supported for samples {brief(x.shape)}"
        )
    if mode == "DCR" and r > 1:
        channels = x.shape[0] // r**2
        order = [k * channels + c for c in range(channels) for k in range(r * r)]
        x = at.add(op, L.Take(order, 1), x)
    return at.add(op, L.PixelShuffle(r), x)


@operator("SpaceToDepth")
def read_space_to_depth(at: Importer, op: Operation) -> Value:
    x, r, mode = at.value(op), op.whole("blocksize", 0), op.word("mode", "DCR")
    if x.rank != 4 or r < 1 or x.shape[1] % r or x.shape[2] % r or mode not in ("DCR", "CRD"):
        raise op.wrong(
            f"blocksize {r} with mode {mode[:40]!r} is not supported for samples {brief(x.shape)}"
        )
    y = at.add(op, L.PixelUnshuffle(r), x)
    order = [c * r * r + k for k in range(r * r) for c in range(x.shape[0])]
    return y if r == 1 or mode == "CRD" else at.add(op, L.Take(order, 1), y)
