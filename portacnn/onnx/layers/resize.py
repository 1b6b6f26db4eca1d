"""Layers that change the image size: interpolation, pixel shuffle and pixel unshuffle."""

from fractions import Fraction
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.errors import ArgumentError
from portacnn.onnx.builder import GraphBuilder, emitter
from portacnn.onnx.importer import BATCH, Importer, Value, operator
from portacnn.onnx.reading import Operation, brief
from portacnn.ops.resize import axes_of

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@emitter(L.Upsample)
def write_upsample(graph: GraphBuilder, layer: Any, x: str) -> str:
    """Write scales if float32 represents them exactly; otherwise write sizes, to avoid rounding
    errors."""
    axes = axes_of(layer.input_shape[1:], layer.size, layer.scale_factor, layer.mode)
    scales = [np.float32(1.0 if ratio is None else float(1 / ratio)) for *_, ratio in axes]
    # With align_corners, ONNX divides by n * scale - 1, which must be a whole number.
    exact = [
        ratio is not None
        and Fraction(float(scale)) == 1 / ratio
        and (not layer.align_corners or n / ratio == m)
        for scale, (n, m, ratio) in zip(scales, axes, strict=True)
    ]
    by_size = [
        ratio is None or layer.align_corners or ratio == Fraction(n, m) for n, m, ratio in axes
    ]
    how: dict[str, Any] = {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}
    if layer.align_corners:
        how["coordinate_transformation_mode"] = "align_corners"
    if layer.mode == "nearest":
        how = {
            "mode": "nearest",
            "coordinate_transformation_mode": "asymmetric",
            "nearest_mode": "floor",
        }
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
    x = at.value(op)
    mode = op.word("mode", "nearest")
    old = op.kind == "Upsample" or at.opset < 11  # no coordinate_transformation_mode
    place = "asymmetric" if old else op.word("coordinate_transformation_mode", "half_pixel")
    rounding = "floor" if old else op.word("nearest_mode", "round_prefer_floor")
    op.ignore("cubic_coeff_a", "exclude_outside", "extrapolation_value")
    if op.whole("antialias", 0) or op.word("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise op.wrong("antialias and keep_aspect_ratio_policy are not supported")
    axes = op.ints("axes")
    axes = list(range(x.rank)) if axes is None else [n % x.rank for n in axes]
    sizes = None if old else at.numbers(op, 3)
    scales = _scales(at, op, old) if not sizes else None
    factors = dict(zip(axes, scales or (), strict=False))
    outs = dict(zip(axes, sizes or (), strict=False))
    given = len(sizes or scales or ())
    if (
        given != len(axes)
        or len(set(axes)) != len(axes)
        or factors.get(0, 1.0) != 1.0
        or outs.get(0, BATCH) not in (BATCH, at.batch)
        or factors.get(1, 1.0) != 1.0
        or outs.get(1, x.shape[0]) != x.shape[0]
        or not 3 <= x.rank <= 5
    ):
        raise op.wrong(
            f"expected scales or sizes for the spatial axes of samples {brief(x.shape)}, got "
            f"{brief(list(sizes or scales or ()))} for axes {brief(axes)}"
        )
    spatial = x.shape[1:]
    if mode == "nearest":
        if (place, rounding) != ("asymmetric", "floor") and not (
            place == "half_pixel"
            and rounding == "round_prefer_floor"
            and _whole(spatial, outs, factors)
        ):
            raise op.wrong(
                f"nearest with {place[:40]!r} and {rounding[:40]!r} is not supported; expected "
                "'asymmetric' and 'floor'"
            )
    elif mode == "linear":
        if place not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
            raise op.wrong(f"linear with {place[:40]!r} is not supported")
    else:
        raise op.wrong(f"mode must be nearest or linear, got {mode[:40]!r}")
    word = "nearest" if mode == "nearest" else _LINEAR[len(spatial)]
    align = mode == "linear" and place == "align_corners"
    if sizes:
        size = [outs.get(i, n) for i, n in enumerate(spatial, 2)]
        if any(n < 1 for n in size):
            raise op.wrong(f"sizes must be at least 1, got {brief(size)}")
        layer = L.Upsample(size, mode=word, align_corners=align)
    else:
        layer = L.Upsample(
            None, [factors.get(i, 1.0) for i in range(2, x.rank)], mode=word, align_corners=align
        )
    if align and not all((n * factors.get(i, 1.0)).is_integer() for i, n in enumerate(spatial, 2)):
        raise op.wrong(
            "linear with 'align_corners' is not supported for scales with a fractional output size"
        )
    y = at.add(op, layer, x)
    if place == "pytorch_half_pixel" and any(
        m == 1 < n for n, m in zip(spatial, y.shape[1:], strict=True)
    ):
        raise op.wrong("'pytorch_half_pixel' with an output size of 1 is not supported")
    return y


def _whole(spatial: tuple[int, ...], outs: dict[int, int], factors: dict[int, float]) -> bool:
    """Return whether every axis grows by a whole factor. All rounding modes then agree."""
    return all(
        outs.get(i, n) % n == 0 and factors.get(i, 1.0).is_integer()
        for i, n in enumerate(spatial, 2)
    )


def _scales(at: Importer, op: Operation, old: bool) -> list[float] | None:
    known = at.known(op, 1 if old else 2)
    if known is None or not 0 < known.array.size <= 16 or known.array.dtype.kind != "f":
        return None
    # Read float32 with its shortest decimal digits: 1.1, not 1.10000002.
    scales = [float(str(np.float32(n))) for n in known.array.reshape(-1)]
    if not all(0.0 < n < float("inf") for n in scales):
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
