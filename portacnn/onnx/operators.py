"""One function per ONNX operator: it reads the operator's inputs and adds equivalent layers.

See onnx.ai/onnx/operators for the meaning of each operator in each opset. An operator that could
mix the samples of a batch, or that takes weights computed from the input, is not supported: a
network here takes any number of independent samples.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import isfinite, prod
from typing import Any

import numpy as np

from portacnn import layers as L
from portacnn.layers import Layer
from portacnn.onnx.importer import BATCH, Importer, Known, Value, no_batch
from portacnn.onnx.reading import FLOATS, Operation, brief
from portacnn.ops.windows import pads_of

Converter = Callable[[Importer, Operation], Any]
OPERATORS: dict[str, Converter] = {}
"""Every operator that is read, by its name."""


def operator(*names: str) -> Callable[[Converter], Converter]:
    """Register a converter under these names."""

    def enter(convert: Converter) -> Converter:
        OPERATORS.update(dict.fromkeys(names, convert))
        return convert

    return enter


def _all_known(at: Importer, op: Operation) -> list[Known] | None:
    """Return all inputs, if all are known."""
    given = [at.given(op, i) for i in range(len(op.inputs))]
    return given if given and all(isinstance(v, Known) for v in given) else None  # type: ignore[return-value]


# --- functions of each element --------------------------------------------------------------------


def _activation(name: str, make: Callable[[Operation], Layer]) -> None:
    OPERATORS[name] = lambda at, op: at.add(op, make(op), at.value(op))


_activation("Relu", lambda op: L.ReLU())
_activation("LeakyRelu", lambda op: L.LeakyReLU(op.real("alpha", 0.01)))
_activation("Elu", lambda op: L.ELU(op.real("alpha", 1.0)))
_activation(
    "Selu",
    lambda op: L.SELU(
        op.real("alpha", 1.67326319217681884765625), op.real("gamma", 1.05070102214813232421875)
    ),
)
_activation("Celu", lambda op: L.CELU(op.real("alpha", 1.0)))
_activation("Sigmoid", lambda op: L.Sigmoid())
_activation("HardSigmoid", lambda op: L.HardSigmoid(op.real("alpha", 0.2), op.real("beta", 0.5)))
_activation("HardSwish", lambda op: L.HardSwish())
_activation("Tanh", lambda op: L.Tanh())
_activation("Softplus", lambda op: L.Softplus())
_activation("Gelu", lambda op: L.GELU(op.word("approximate", "none")))
for _name, _short in {
    "Abs": "abs",
    "Cos": "cos",
    "Erf": "erf",
    "Exp": "exp",
    "Log": "log",
    "Mish": "mish",
    "Reciprocal": "reciprocal",
    "Sin": "sin",
    "Softsign": "softsign",
}.items():
    _activation(_name, lambda op, function=_short: L.Elementwise(function))  # type: ignore[misc]


@operator("Neg", "Sqrt")
def _function(at: Importer, op: Operation) -> Any:
    function = {"Neg": "negative", "Sqrt": "sqrt"}[op.kind]
    if known := _all_known(at, op):
        at.source.budget.take(known[0].array.nbytes)
        return at.fold(getattr(np, function)(known[0].array), known)
    return at.add(op, L.Elementwise(function), at.value(op))


@operator("Swish")
def _swish(at: Importer, op: Operation) -> Value:
    if op.real("alpha", 1.0) != 1.0:
        raise op.wrong("alpha must be 1")
    return at.add(op, L.SiLU(), at.value(op))


@operator("PRelu")
def _prelu(at: Importer, op: Operation) -> Value:
    x, slope = at.value(op), at.weight(op, 1)
    array = slope.array
    if at.opset < 7 and array.ndim == 1 and array.size > 1:  # one for each channel
        array = array.reshape((-1,) + (1,) * (x.rank - 2))
    array = _of_sample(op, array, x)
    return at.add(op, L.PReLU(array.shape), x, weight=slope._replace(array=array))


@operator("Clip")
def _clip(at: Importer, op: Operation) -> Value:
    least, most = at.number(op, 1, "min", None), at.number(op, 2, "max", None)
    bounds = [
        b if b is not None and isfinite(b) and abs(b) < 3.4e38 else None for b in (least, most)
    ]
    if least != least or most != most:
        raise op.wrong("a bound is NaN")
    return at.add(op, L.Clip(*bounds), at.value(op))


@operator("Softmax", "LogSoftmax")
def _softmax(at: Importer, op: Operation) -> Value:
    x, kind = at.value(op), {"Softmax": L.Softmax, "LogSoftmax": L.LogSoftmax}[op.kind]
    axis = at.axis(op, op.whole("axis", -1 if at.opset >= 13 else 1), x.rank)
    if at.opset >= 13 or all(n == 1 for n in x.shape[axis:]):
        return at.add(op, kind(axis), x)
    # Before opset 13 all axes from there on are one.
    flat = at.reshaped(op, x, (*x.shape[: axis - 1], prod(x.shape[axis - 1 :])))
    return at.reshaped(op, at.add(op, kind(axis), flat), x.shape)


def _for_inference(at: Importer, op: Operation) -> None:
    """Check that the operator does not train.

    Before opset 7, ``is_test=0`` means that it trains whenever it runs. Later opsets do not have
    the attribute.
    """
    if at.opset >= 7 and op.has("is_test"):
        raise op.wrong("is_test is an attribute of opset 6 and older")
    if not op.whole("is_test", 1):
        raise op.wrong("is_test=0 trains whenever the network runs; export it for inference")


@operator("Dropout")
def _dropout(at: Importer, op: Operation) -> Value:
    op.ignore("seed")
    _for_inference(at, op)
    training = at.known(op, 2) if at.opset >= 12 else None
    if training is not None and training.array.any():
        raise op.wrong(
            "training_mode is set, so it would drop out at inference; export the network for "
            "inference"
        )
    ratio = at.number(op, 1, "ratio", 0.5)
    return at.add(op, L.Dropout(0.5 if ratio is None else ratio), at.value(op))


@operator("Identity")
def _identity(at: Importer, op: Operation) -> Any:
    found = at.given(op, 0)
    return at.value(op) if found is None else found


# --- convolution and pooling ----------------------------------------------------------------------


def _pads(
    at: Importer,
    op: Operation,
    x: Value,
    kernel: Sequence[int],
    strides: list[int],
    dilations: list[int],
) -> Any:
    """Return (before, after) for each spatial axis."""
    auto, axes = op.word("auto_pad", "NOTSET"), len(kernel)
    pads = op.sizes("pads", 2 * axes, 0, 0)
    given = list(zip(pads[:axes], pads[axes:], strict=True))
    if auto == "NOTSET":
        return given
    if auto not in ("VALID", "SAME_UPPER", "SAME_LOWER"):
        raise op.wrong(
            f"auto_pad must be NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {auto[:80]!r}"
        )
    pairs = [(0, 0)] * axes
    if auto != "VALID":
        pairs = list(pads_of("same", x.shape[1:], kernel, strides, dilations))
        pairs = pairs if auto == "SAME_UPPER" else [(after, before) for before, after in pairs]
    if op.has("pads") and pairs != given:  # runtimes differ on which of them holds
        raise op.wrong(
            f"auto_pad={auto} means {brief(pairs)}, but pads are {brief(given)}; only one may be "
            "given"
        )
    return pairs


def _spatial(at: Importer, op: Operation, x: Value) -> int:
    """Return the number of spatial axes, 1 to 3."""
    if not 3 <= x.rank <= 5:
        raise op.wrong(f"expected samples (C, W), (C, H, W) or (C, D, H, W), got {brief(x.shape)}")
    return x.rank - 2


def _convolution(
    at: Importer, op: Operation
) -> tuple[Value, Known, Known | None, list[int], list[int], list[int]]:
    """Return x, weight, bias, kernel, strides, dilations."""
    x, weight, bias = at.value(op), at.weight(op, 1), at.optional_weight(op, 2)
    axes = _spatial(at, op, x)
    if weight.array.ndim != axes + 2 or 0 in weight.array.shape:
        raise op.wrong(
            f"a weight {brief(weight.array.shape)} does not fit samples {brief(x.shape)}"
        )
    kernel = list(weight.array.shape[2:])
    if op.has("kernel_shape") and op.ints("kernel_shape") != kernel:
        raise op.wrong(f"kernel_shape must be that of the weight, {brief(kernel)}")
    return (
        x,
        weight,
        bias,
        kernel,
        op.sizes("strides", axes, 1, 1),
        op.sizes("dilations", axes, 1, 1),
    )


@operator("Conv")
def _conv(at: Importer, op: Operation) -> Value:
    x, weight, bias, kernel, strides, dilations = _convolution(at, op)
    kind = (L.Conv1d, L.Conv2d, L.Conv3d)[len(kernel) - 1]
    layer = kind(
        x.shape[0],
        weight.array.shape[0],
        kernel,
        strides,
        _simple(_pads(at, op, x, kernel, strides, dilations)),
        dilations,
        _group(op),
        bias is not None,
    )
    return at.add(op, layer, x, weight=weight, **_some(bias=bias))


@operator("ConvTranspose")
def _conv_transpose(at: Importer, op: Operation) -> Value:
    x, weight, bias, kernel, strides, dilations = _convolution(at, op)
    axes = len(kernel)
    kind = (L.ConvTranspose1d, L.ConvTranspose2d, L.ConvTranspose3d)[axes - 1]
    groups, extra = _group(op), op.sizes("output_padding", axes, 0, 0)
    auto = op.word("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER") or op.has("output_shape"):
        wanted = op.ints("output_shape") or [
            n * s for n, s in zip(x.shape[1:], strides, strict=True)
        ]
        if len(wanted) == axes + 2:  # with batch and channels, as some tools have it
            wanted = wanted[2:]
        if len(wanted) != axes:
            raise op.wrong(f"output_shape must be {axes} numbers, got {brief(wanted)}")
        op.ignore("pads")
        pads = []
        for i, (n, s, k, d) in enumerate(zip(x.shape[1:], strides, kernel, dilations, strict=True)):
            total = s * (n - 1) + extra[i] + (k - 1) * d + 1 - wanted[i]
            if total < 0:  # more cells are asked for than there are: they come at the end
                extra[i], total = extra[i] - total, 0
            half = total // 2
            pads.append((half, total - half) if auto == "SAME_UPPER" else (total - half, half))
    else:
        pads = _pads(at, op, x, kernel, strides, dilations)
    layer = kind(
        x.shape[0],
        weight.array.shape[1] * groups,
        kernel,
        strides,
        _simple(pads),
        extra,
        groups,
        bias is not None,
        dilations,
    )
    return at.add(op, layer, x, weight=weight, **_some(bias=bias))


def _group(op: Operation) -> int:
    groups = op.whole("group", 1)
    if not 1 <= groups < 1 << 31:
        raise op.wrong(f"group must be at least 1, got {groups}")
    return groups


def _simple(pads: Sequence[tuple[int, int]]) -> Any:
    """Return one number per axis if the two sides are equal, as layers are usually written."""
    return (
        [before for before, _ in pads]
        if all(before == after for before, after in pads)
        else [list(p) for p in pads]
    )


def _some(**state: Known | None) -> dict[str, Known]:
    return {name: known for name, known in state.items() if known is not None}


@operator("MaxPool", "AveragePool")
def _pool(at: Importer, op: Operation) -> Value:
    x = at.value(op)
    axes = _spatial(at, op, x)
    if not op.has("kernel_shape"):
        raise op.wrong("kernel_shape is missing")
    kernel = op.sizes("kernel_shape", axes, 1, 1)
    strides, dilations = op.sizes("strides", axes, 1, 1), op.sizes("dilations", axes, 1, 1)
    pads = [list(pair) for pair in _pads(at, op, x, kernel, strides, dilations)]
    ceil = bool(op.whole("ceil_mode", 0))
    if op.kind == "MaxPool":
        op.ignore("storage_order")  # of the second output
        most = (L.MaxPool1d, L.MaxPool2d, L.MaxPool3d)[axes - 1]
        return at.add(op, most(kernel, strides, _narrow(pads, kernel), dilations, ceil), x)
    counted = bool(op.whole("count_include_pad", 0))
    mean = (L.AvgPool1d, L.AvgPool2d, L.AvgPool3d)[axes - 1]
    return at.add(
        op, mean(kernel, strides, _narrow(pads, kernel), ceil, counted, None, dilations), x
    )


def _narrow(pads: list[list[int]], kernel: Sequence[int]) -> Any:
    """Return padding as PyTorch writes it, if PyTorch can express it."""
    plain = all(before == after <= k // 2 for (before, after), k in zip(pads, kernel, strict=True))
    return [before for before, _ in pads] if plain else pads


@operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(at: Importer, op: Operation) -> Value:
    return at.add(
        op, L.GlobalAvgPool() if op.kind == "GlobalAveragePool" else L.GlobalMaxPool(), at.value(op)
    )


# --- normalization --------------------------------------------------------------------------------


@operator("BatchNormalization")
def _batch_norm(at: Importer, op: Operation) -> Value:
    x = at.value(op)
    weight, bias, mean, var = (at.weight(op, i) for i in range(1, 5))
    op.ignore("consumed_inputs")
    _for_inference(at, op)
    if op.whole("training_mode", 0) or not op.whole("spatial", 1):
        raise op.wrong(
            "training_mode and spatial=0 are not supported; export the network for inference"
        )
    if any(op.outputs[1:]):  # so it was said before opset 14 that it trains
        raise op.wrong(
            f"it has {len(op.outputs)} outputs, so it uses the statistics of every batch, which "
            "is not supported; export the network for inference"
        )
    kinds = {2: L.BatchNorm1d, 3: L.BatchNorm1d, 4: L.BatchNorm2d, 5: L.BatchNorm3d}
    if x.rank not in kinds:
        raise op.wrong(f"expected samples (C,) to (C, D, H, W), got {brief(x.shape)}")
    layer = kinds[x.rank](
        x.shape[0], op.real("epsilon", 1e-5), round(1.0 - op.real("momentum", 0.9), 7)
    )
    counted = Known(np.zeros((), np.int64))
    state = {"running_mean": mean, "running_var": var, "num_batches_tracked": counted}
    return at.add(op, layer, x, weight=weight, bias=bias, **state)


@operator("InstanceNormalization")
def _instance_norm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.weight(op, 2)
    op.ignore("consumed_inputs")
    kind = (L.InstanceNorm1d, L.InstanceNorm2d, L.InstanceNorm3d)[_spatial(at, op, x) - 1]
    return at.add(
        op, kind(x.shape[0], op.real("epsilon", 1e-5), affine=True), x, weight=weight, bias=bias
    )


@operator("LayerNormalization")
def _layer_norm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.optional_weight(op, 2)
    op.ignore("stash_type")
    axis = at.axis(op, op.whole("axis", -1), x.rank)
    layer = L.LayerNorm(x.shape[axis - 1 :], op.real("epsilon", 1e-5), True, bias is not None)
    return at.add(op, layer, x, weight=weight, **_some(bias=bias))


@operator("GroupNormalization")
def _group_norm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.weight(op, 2)
    op.ignore("stash_type")
    groups = op.whole("num_groups", 0)
    if not x.shape or groups < 1 or x.shape[0] % groups:
        raise op.wrong(
            f"num_groups={groups} do not divide the channels of samples {brief(x.shape)}"
        )
    if at.opset < 21:  # one number for each group
        each = x.shape[0] // groups
        if weight.array.shape != (groups,) or bias.array.shape != (groups,):
            raise op.wrong(f"scale and bias must be ({groups},)")
        at.source.budget.take(16 * x.shape[0])
        weight, bias = (k._replace(array=np.repeat(k.array, each)) for k in (weight, bias))
    layer = L.GroupNorm(groups, x.shape[0], op.real("epsilon", 1e-5))
    return at.add(op, layer, x, weight=weight, bias=bias)


@operator("LRN")
def _lrn(at: Importer, op: Operation) -> Value:
    size = op.whole("size", 0)
    if size % 2 == 0:
        raise op.wrong(f"size={size} is not odd; only odd ones are supported")
    layer = L.LocalResponseNorm(
        size, op.real("alpha", 1e-4), op.real("beta", 0.75), op.real("bias", 1.0)
    )
    return at.add(op, layer, at.value(op))


# --- products of matrices -------------------------------------------------------------------------


@operator("Gemm")
def _gemm(at: Importer, op: Operation) -> Value:
    x, weight, bias = at.value(op), at.weight(op, 1), at.optional_weight(op, 2)
    op.ignore("broadcast")
    if len(x.shape) != 1 or op.whole("transA", 0):
        raise op.wrong(f"expected samples (F,) and no transA, got {brief(x.shape)}")
    if weight.array.ndim != 2:
        raise op.wrong(f"expected a matrix as weight, got {brief(weight.array.shape)}")
    matrix = weight.array if op.whole("transB", 0) else weight.array.T
    matrix = _scaled(at, matrix, op.real("alpha", 1.0))
    state = {"weight": weight._replace(array=matrix)}
    beta = op.real("beta", 1.0)
    if bias is not None:
        outputs = matrix.shape[0]
        if bias.array.size not in (1, outputs) or any(n != 1 for n in bias.array.shape[:-1]):
            raise op.wrong(
                f"a bias {brief(bias.array.shape)} is not one number for each of {outputs} outputs"
            )
        row = _scaled(at, bias.array.reshape(-1), beta)
        at.source.budget.take(8 * outputs)
        state["bias"] = bias._replace(array=np.broadcast_to(row, (outputs,)))
    return at.add(op, L.Linear(x.shape[0], matrix.shape[0], bias is not None), x, **state)


def _scaled(at: Importer, array: Any, factor: float) -> Any:
    if factor == 1.0:
        return array
    at.source.budget.take(array.nbytes)
    return (array * factor).astype(array.dtype)


@operator("MatMul")
def _matmul(at: Importer, op: Operation) -> Value:
    x, other = at.value(op), at.given(op, 1)
    if isinstance(other, Value):
        return at.add(op, L.MatMul(), x, other)
    weight = at.weight(op, 1)
    if weight.array.ndim != 2:
        raise op.wrong(f"expected a matrix as weight, got {brief(weight.array.shape)}")
    features, outputs = weight.array.shape
    if len(x.shape) == 1:
        layer: Layer = L.Linear(features, outputs, bias=False)
        return at.add(op, layer, x, weight=weight._replace(array=weight.array.T))
    return at.add(op, L.MatMulWith(outputs), x, weight=weight)


# --- arithmetic -----------------------------------------------------------------------------------

_ARITHMETIC = {
    "Add": "add",
    "Sum": "add",
    "Sub": "subtract",
    "Mul": "multiply",
    "Div": "divide",
    "Pow": "power",
    "Max": "maximum",
    "Min": "minimum",
}


@operator(*_ARITHMETIC)
def _arithmetic(at: Importer, op: Operation) -> Any:
    kind = _ARITHMETIC[op.kind]
    given = [at.given(op, i) for i in range(len(op.inputs))]
    if (
        None in given
        or not given
        or (op.kind in ("Add", "Sub", "Mul", "Div", "Pow") and len(given) != 2)
    ):
        raise op.wrong(f"it has {len(given)} inputs, or one is omitted")
    legacy = op.whole("axis", -1) if at.opset < 7 and op.whole("broadcast", 0) else None
    op.ignore("consumed_inputs")
    result = given[0]
    for other in given[1:]:
        result = _two(at, op, kind, result, other, legacy)
    return result


def _two(at: Importer, op: Operation, kind: str, a: Any, b: Any, legacy: int | None) -> Any:
    if isinstance(a, Known) and isinstance(b, Known):
        return _folded(at, op, kind, a, b)
    if isinstance(a, Value) and isinstance(b, Value):
        return at.add(op, L.Arithmetic(kind), a, b)
    x, constant = (a, b) if isinstance(a, Value) else (b, a)
    array = constant.array
    if array.dtype.kind not in "fiu":
        raise op.wrong(f"expected numbers, got {array.dtype}")
    # before opset 7: an axis says where the smaller one begins
    if legacy is not None and array.ndim:
        if not -1 <= legacy < x.rank:
            raise op.wrong(f"axis {legacy} is outside the {x.rank} axes")
        array = array.reshape(
            array.shape + (1,) * (x.rank - legacy - array.ndim if legacy >= 0 else 0)
        )
    if array.dtype.kind != "f":
        at.source.budget.take(8 * array.size)
        array = array.astype(np.float64)
    array = _of_sample(op, array, x)
    learn = constant.learn and array.size > 1 and kind in ("add", "subtract", "multiply", "divide")
    layer = L.ArithmeticWith(kind, array.shape, constant is a, learn)
    return at.add(op, layer, x, value=constant._replace(array=array))


def _of_sample(op: Operation, array: Any, x: Value) -> Any:
    """Return a constant without the batch axis, which must be 1 or missing.

    A constant with more axes than x would move the batch.
    """
    shape = array.shape
    if len(shape) == x.rank and shape[0] == 1:
        shape = shape[1:]
    if len(shape) >= x.rank or 0 in shape:
        raise op.wrong(
            f"a constant {brief(array.shape)} is not the same for all samples {brief(x.shape)}"
        )
    return array.reshape(shape)


def _folded(at: Importer, op: Operation, kind: str, a: Known, b: Known) -> Known:
    if a.array.dtype != b.array.dtype or a.array.dtype.kind not in "fiu":
        raise op.wrong(
            f"constants must have one kind of dtype, got {a.array.dtype} and {b.array.dtype}"
        )
    try:
        shape = np.broadcast_shapes(a.array.shape, b.array.shape)
    except ValueError:
        raise op.wrong(
            f"constants {brief(a.array.shape)} and {brief(b.array.shape)} do not broadcast"
        ) from None
    at.source.budget.take(prod(shape) * a.array.dtype.itemsize)
    if kind in ("divide", "power") and a.array.dtype.kind != "f":
        if kind == "power" or (b.array == 0).any() or (a.array < 0).any() or (b.array < 0).any():
            raise op.wrong(f"{op.kind} of whole constants like these is not supported")
        return at.fold(a.array // b.array, [a, b])
    return at.fold(getattr(np, kind)(a.array, b.array).astype(a.array.dtype), [a, b])


@operator("ReduceMean", "ReduceSum")
def _reduce(at: Importer, op: Operation) -> Any:
    x = at.value(op)
    axes, kept = at.numbers(op, 1, "axes"), bool(op.whole("keepdims", 1))
    if not axes:
        if op.whole("noop_with_empty_axes", 0):
            return x
        axes = range(x.rank)  # type: ignore[assignment]
    op.ignore("noop_with_empty_axes")
    axes = sorted(at.axes(op, axes or [], x.rank))
    if op.kind == "ReduceMean" and x.rank > 2 and axes == list(range(2, x.rank)):
        return at.add(op, L.GlobalAvgPool(flatten=not kept), x)
    return at.add(op, L.Reduce("mean" if op.kind == "ReduceMean" else "sum", axes, kept), x)


# --- shapes ---------------------------------------------------------------------------------------


@operator("Reshape")
def _reshape(at: Importer, op: Operation) -> Any:
    found, wanted = at.given(op, 0), at.numbers(op, 1, "shape")
    if wanted is None:
        raise op.wrong("its input 1 is missing")
    if op.whole("allowzero", 0) and 0 in wanted:
        raise op.wrong("a shape contains 0")
    if isinstance(found, Known):
        return _reshape_known(at, op, found, wanted)
    x = at.value(op)
    first, *rest = wanted or [0]
    rest = [x.shape[i] if n == 0 and i < len(x.shape) else n for i, n in enumerate(rest)]
    numbers, open_ = prod(x.shape), rest.count(-1)
    keeps = first in (BATCH, 0) or first == at.batch  # whether it says that the samples stay
    if open_ == 1 and keeps:
        others = prod(n for n in rest if n != -1)
        if others > 0 and numbers % others == 0:
            rest = [numbers // others if n == -1 else n for n in rest]
    if any(n < 1 for n in rest) or prod(rest) != numbers or not (keeps or first == -1):
        wanted = ["N" if n == BATCH else n for n in wanted]  # type: ignore[misc]
        raise op.wrong(
            f"reshaping samples {brief(x.shape)} to {brief(wanted)} would move elements from one "
            "sample to another"
        )
    return at.reshaped(op, x, rest)


def _reshape_known(at: Importer, op: Operation, known: Known, wanted: list[int]) -> Known:
    array = known.array
    shape = [array.shape[i] if n == 0 and i < array.ndim else n for i, n in enumerate(wanted)]
    others = prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and others > 0:
        shape = [array.size // others if n == -1 else n for n in shape]
    if any(n < 0 for n in shape) or prod(shape) != array.size or len(shape) > 16:
        raise op.wrong(f"a constant {brief(array.shape)} cannot be reshaped to {brief(wanted)}")
    return at.fold(array.reshape(shape), [known])


@operator("Flatten")
def _flatten(at: Importer, op: Operation) -> Any:
    x = at.value(op)
    axis = op.whole("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if not 1 <= axis <= x.rank or any(n != 1 for n in x.shape[: axis - 1]):
        raise op.wrong(
            f"axis {op.whole('axis', 1)} puts several samples {brief(x.shape)} into one row, or "
            "one into several"
        )
    return at.reshaped(op, x, (prod(x.shape),))


@operator("Squeeze")
def _squeeze(at: Importer, op: Operation) -> Any:
    found, axes = at.given(op, 0), at.numbers(op, 1, "axes")
    if isinstance(found, Known):
        shape = found.array.shape
        away = (
            [i for i, n in enumerate(shape) if n == 1]
            if axes is None
            else _plain_axes(op, axes, len(shape))
        )
        if any(shape[i] != 1 for i in away):
            raise op.wrong(f"axes {brief(away)} of {brief(shape)} are not all 1")
        return at.fold(
            found.array.reshape([n for i, n in enumerate(shape) if i not in away]), [found]
        )
    x = at.value(op)
    if axes is None:
        if at.batch == 1:
            raise op.wrong("without axes it would also remove the batch")
        axes = [i for i, n in enumerate(x.shape, 1) if n == 1]
    away = at.axes(op, axes, x.rank)
    if any(x.shape[i - 1] != 1 for i in away):
        raise op.wrong(f"axes {brief(axes)} of samples {brief(x.shape)} are not all 1")
    return at.reshaped(op, x, [n for i, n in enumerate(x.shape, 1) if i not in away])


def _plain_axes(op: Operation, axes: Sequence[int], rank: int) -> list[int]:
    """Return the axes of a constant."""
    if any(not -rank <= axis < rank for axis in axes) or len({axis % rank for axis in axes}) != len(
        axes
    ):
        raise op.wrong(f"axes {brief(axes)} are outside the {rank} axes")
    return [axis % rank for axis in axes]


@operator("Unsqueeze")
def _unsqueeze(at: Importer, op: Operation) -> Any:
    found, axes = at.given(op, 0), at.numbers(op, 1, "axes")
    if axes is None or len(axes) > 8:
        raise op.wrong("its axes are missing or too many")
    if isinstance(found, Known):
        rank = found.array.ndim + len(axes)
        new, old = _plain_axes(op, axes, rank), iter(found.array.shape)
        if rank > 16:
            raise op.wrong("more than 16 axes")
        return at.fold(
            found.array.reshape([1 if i in new else next(old) for i in range(rank)]), [found]
        )
    x = at.value(op)
    rank = x.rank + len(axes)
    new, old = at.axes(op, axes, rank), iter(x.shape)
    if rank > 16:
        raise op.wrong("more than 16 axes")
    return at.reshaped(op, x, [1 if i in new else next(old) for i in range(1, rank)])


@operator("Transpose")
def _transpose(at: Importer, op: Operation) -> Any:
    found = at.given(op, 0)
    rank = found.array.ndim if isinstance(found, Known) else at.value(op).rank
    order = op.ints("perm")
    order = list(range(rank))[::-1] if order is None else order
    if sorted(order) != list(range(rank)):
        raise op.wrong(f"perm {brief(order)} is not every axis of {rank} once")
    if isinstance(found, Known):
        return at.fold(found.array.transpose(order), [found])
    if order[:1] != [0]:
        raise op.wrong(f"perm {brief(order)} moves the batch away from axis 0")
    return (
        at.value(op) if order == list(range(rank)) else at.add(op, L.Permute(order), at.value(op))
    )


@operator("Concat")
def _concat(at: Importer, op: Operation) -> Any:
    if known := _all_known(at, op):
        arrays = [k.array for k in known]
        rank = arrays[0].ndim
        (axis,) = _plain_axes(op, [op.whole("axis", 1)], rank)
        alike = {(a.dtype.str, a.shape[:axis], a.shape[axis + 1 :], a.ndim) for a in arrays}
        if len(alike) != 1:
            raise op.wrong("constants cannot be concatenated")
        at.source.budget.take(sum(a.nbytes for a in arrays))
        return at.fold(np.concatenate(arrays, axis=axis), known)
    values = [at.value(op, i) for i in range(len(op.inputs))]
    if not values:
        raise op.wrong("it has no inputs")
    axis = at.axis(op, op.whole("axis", 1), values[0].rank)
    return values[0] if len(values) == 1 else at.add(op, L.Concat(axis), *values)


@operator("Split")
def _split(at: Importer, op: Operation) -> list[Any]:
    x = at.value(op)
    axis = at.axis(op, op.whole("axis", 0), x.rank)
    size, count = x.shape[axis - 1], len(op.outputs)
    sizes = at.numbers(op, 1, "split")
    if op.has("num_outputs") and op.whole("num_outputs", 0) != count:
        raise op.wrong("num_outputs must be the number of its outputs")
    if sizes is None:
        each = -(-size // count)
        sizes = [each] * (count - 1) + [size - each * (count - 1)]
    if len(sizes) != count or any(n < 1 for n in sizes) or sum(sizes) != size:
        raise op.wrong(f"{size} elements cannot be split into {brief(sizes)} for {count} outputs")
    ends = [0]
    for n in sizes:
        ends.append(ends[-1] + n)
    return [_cut(at, op, x, {axis: (first, last, 1)}) for first, last in pairwise(ends)]


def _cut(at: Importer, op: Operation, x: Value, parts: dict[int, tuple[int, int, int]]) -> Value:
    """Add a slice of some axes: (start, stop, step) of each."""
    whole = [parts.get(axis, (0, n, 1)) for axis, n in enumerate(x.shape, 1)]
    starts, stops, steps = zip(*whole, strict=True)
    return at.add(op, L.Slice(starts, stops, steps), x)


@operator("Slice")
def _slice(at: Importer, op: Operation) -> Any:
    found = at.given(op, 0)
    starts, ends = at.numbers(op, 1, "starts"), at.numbers(op, 2, "ends")
    if starts is None or ends is None:
        raise op.wrong("starts or ends are missing")
    axes = at.numbers(op, 3, "axes")
    axes = list(range(len(starts))) if axes is None else axes
    steps = at.numbers(op, 4)
    steps = [1] * len(starts) if steps is None else steps
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise op.wrong("starts, ends, axes and steps have different lengths")
    if isinstance(found, Known):
        axes = _plain_axes(op, axes, found.array.ndim)
        index = [slice(None)] * found.array.ndim
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
            index[axis] = slice(
                start, None if step < 0 and end < -found.array.shape[axis] else end, step
            )
        return at.fold(found.array[tuple(index)], [found])
    x = at.value(op)
    parts = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if axis in (0, -x.rank) and (start, step) == (0, 1) and end >= (1 << 31) - 1:
            continue  # all samples
        axis = at.axis(op, axis, x.rank)
        start, stop, step = slice(start, end, step).indices(x.shape[axis - 1])
        if step < 1 or start >= stop or axis in parts:
            raise op.wrong(f"axis {axis} would be empty or reversed")
        parts[axis] = (start, stop, step)
    return _cut(at, op, x, parts) if parts else x


@operator("Pad")
def _pad(at: Importer, op: Operation) -> Any:
    x = at.value(op)
    mode = op.word("mode", "constant")
    modes = {"constant": "zeros", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if mode not in modes:
        raise op.wrong(f"mode must be one of {', '.join(modes)}; got {mode[:80]!r}")
    given = at.numbers(op, 1, "pads" if op.has("pads") else "paddings")
    axes = at.numbers(op, 3)
    chosen = list(range(x.rank)) if axes is None else _plain_axes(op, axes, x.rank)
    if given is None or len(given) != 2 * len(chosen) or not all(0 <= n < 1 << 31 for n in given):
        raise op.wrong(
            f"pads must be 2 numbers of at least 0 for each of {len(chosen)} axes, got "
            f"{brief(given or [])}"
        )
    value = at.number(op, 2, "value", 0.0)
    pads = [[0, 0] for _ in range(x.rank)]
    for i, axis in enumerate(chosen):
        pads[axis] = [given[i], given[i + len(chosen)]]
    if any(pads[0]):
        raise op.wrong("it adds samples to the batch (axis 0)")
    if not any(map(any, pads)):
        return x
    return at.add(op, L.Pad(pads[1:], modes[mode], value or 0.0 if mode == "constant" else 0.0), x)


# --- known numbers --------------------------------------------------------------------------------


@operator("Constant")
def _constant(at: Importer, op: Operation) -> Known:
    found = op.any_of(
        ("value", "t"),
        ("value_float", "f"),
        ("value_floats", "floats"),
        ("value_int", "i"),
        ("value_ints", "ints"),
    )
    if found is None:
        raise op.wrong("its value must be a tensor of numbers")
    name, value = found
    if name == "value":
        return Known(at.source.array(value))
    return at.fold(np.array(value, np.float32 if "float" in name else np.int64))


@operator("ConstantOfShape")
def _constant_of_shape(at: Importer, op: Operation) -> Known:
    shape, found = at.numbers(op, 0), op.any_of(("value", "t"))
    value = np.zeros((), np.float32) if found is None else at.source.array(found[1])
    if (
        shape is None
        or value.size != 1
        or any(not 0 <= n < 1 << 31 for n in shape)
        or len(shape) > 16
    ):
        raise op.wrong("its shape or value is invalid")
    if 0 in shape and len(shape) > 1:
        raise op.wrong(f"a tensor of shape {brief(shape)} is empty")
    at.source.budget.take(prod(shape) * value.itemsize)
    return at.fold(np.full(shape, value.reshape(()), value.dtype))


@operator("Shape")
def _shape(at: Importer, op: Operation) -> Known:
    found = at.given(op, 0)
    shape = found.array.shape if isinstance(found, Known) else (BATCH, *at.value(op).shape)
    end = op.whole("end", len(shape)) if op.has("end") else None
    return at.fold(np.array(shape[slice(op.whole("start", 0), end)], np.int64))


@operator("Gather")
def _gather(at: Importer, op: Operation) -> Any:
    if isinstance(at.given(op, 0), Value):
        return _take(at, op)
    data, indices = at.known(op, 0), at.known(op, 1)
    if (
        data is None
        or indices is None
        or not data.array.ndim
        or indices.array.dtype.kind not in "iu"
    ):
        raise op.wrong("its inputs are missing, or its indices are not whole numbers")
    (axis,) = _plain_axes(op, [op.whole("axis", 0)], data.array.ndim)
    size = data.array.shape[axis]
    if (
        indices.array.size
        and not -size <= int(indices.array.min()) <= int(indices.array.max()) < size
    ):
        raise op.wrong(f"indices are beyond the {size} elements of axis {axis}")
    if indices.array.ndim + data.array.ndim > 16:
        raise op.wrong("more than 16 axes")
    at.source.budget.take(data.array.nbytes // max(size, 1) * indices.array.size)
    return at.fold(np.take(data.array, indices.array, axis=axis), [data])


def _take(at: Importer, op: Operation) -> Value:
    """Add a selection of elements by known indices; their axis becomes the index array's axes."""
    x, known = at.value(op), at.known(op, 1)
    indices, axis = at.numbers(op, 1) or [], at.axis(op, op.whole("axis", 0), x.rank)
    size = x.shape[axis - 1]
    if (
        known is None
        or not all(-size <= i < size for i in indices)
        or x.rank + known.array.ndim > 16
    ):
        raise op.wrong(f"indices {brief(indices)} are beyond the {size} elements of axis {axis}")
    y = at.add(op, L.Take([i % size for i in indices], axis), x)
    return at.reshaped(op, y, (*x.shape[: axis - 1], *known.array.shape, *x.shape[axis:]))


_CAST = {
    **{number: name for number, name in FLOATS.items() if name != "bfloat16"},
    6: "int32",
    7: "int64",
    9: "bool",
}


@operator("Cast")
def _cast(at: Importer, op: Operation) -> Any:
    found, to = at.given(op, 0), op.whole("to", 0)
    op.ignore("saturate", "round_mode")
    if isinstance(found, Known):
        if to not in _CAST:
            raise op.wrong(f"casting constants to type {to} is not supported")
        dtype = np.dtype(_CAST[to])
        if dtype != np.int64:
            no_batch(op, found)
        at.source.budget.take(found.array.size * dtype.itemsize)
        return at.fold(found.array.astype(dtype), [found])
    if to not in FLOATS:
        raise op.wrong(f"values can be cast only to floating point, not to type {to}")
    return at.value(op)
