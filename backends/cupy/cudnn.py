"""Convolution on CUDA through cuDNN's graphs (package nvidia-cudnn-frontend), for those too large
for our kernels to win.

Nothing of this has run on a GPU yet: it is off unless ``PORTACNN_CUDNN`` asks for it.

Notation as in conv.py: N batch, C in-channels and O out-channels of one group, G groups, H/W and
OH/OW the axes in and out. cuDNN knows the number of groups from the channels of image and filter.
It wants the batch first, so what lies (C, H, W, N) with us is packed anew on the way in and on the
way out; ``takes`` counts that in.
"""

import logging
import os
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

from portacnn.backends.cupy.geometry import Plan
from portacnn.errors import ArgumentError, BackendError
from portacnn.ops import dispatch
from portacnn.runtime import Array, dtype_name

VARIABLE = "PORTACNN_CUDNN"
_CHOICES = ("0", "1", "all")
_REMEDY = (
    f"{VARIABLE} asks for cuDNN, and nvidia-cudnn-frontend is not installed: pip install "
    '"portacnn[cudnn]" '
    f'(or "portacnn[cudnn12]" beside "portacnn[cuda12]"), or do without {VARIABLE}'
)

LARGE = 2**31
MUCH = 256
"""From how many multiply-adds on, and how many for each number that is packed, a convolution goes
to cuDNN.

Reckoned, not measured: with 15e12 multiply-adds a second for our kernel and 24e12 for cuDNN's, a
multiply-add saves 2.5e-14 s. Packing is some four launches more, 10 microseconds each, and 8 bytes
read and written at 1e12 bytes a second for every number of image and result. The first is made up
for by 1.6e9 multiply-adds, the second by 320 for each number: the powers of two next to them stand
here.
"""
WORKSPACE = 512 * 2**20  # bytes: plans that need more room are left out

_ORDERS = {"float32": (0, 1, 2, 3), "tf32": (0, 2, 3, 1)}
"""The axes of (N, C, H, W) in memory, by precision: tensor cores read channels side by side, other
units planes.

For bfloat16 and float16, convolutions stay with our kernels."""
_ALIGNED = 16  # bytes: where cuDNN takes it that every tensor begins, if it is not told otherwise
_LAST = (3, 0, 1, 2)  # (C, H, W, N) -> (N, C, H, W)
_TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}
_NOTES = (
    "NONDETERMINISTIC",
    "REDUCED_PRECISION_REDUCTION",
    "DOWN_CONVERT_INPUTS",
    "WINOGRAD_TILE_13x13",
)
_EXACT_NOTES = (*_NOTES, "TENSOR_CORE")
"""Numerical notes of engines that may not be chosen; with TENSOR_CORE among them, float32 is not
rounded to TF32."""

_INPUTS = {"fprop": ("image", "weight"), "dgrad": ("loss", "filter"), "wgrad": ("image", "loss")}
_RESULT = {"fprop": "loss", "dgrad": "image", "wgrad": "filter"}
"""cuDNN's operations, what they call their two inputs, and like which their result is. The
identifiers are 1, 2 and 3."""

_log = logging.getLogger("portacnn")
_lock = Lock()  # a handle and its plans serve one thread at a time
_graphs: dict[tuple, Any] = {}
"""Graph by what it was built for; None where cuDNN has none. Never dropped: a captured CUDA graph
may go on using its code."""


# --- whether --------------------------------------------------------------------------------------


@cache
def choice() -> str:
    """What ``PORTACNN_CUDNN`` says: "0" for never, "1" for large convolutions, "all" for every one
    (to measure by).

    Raises:
        ArgumentError: another word.
        BackendError: cuDNN was asked for and can't be had; with the remedy.
    """
    word = os.environ.get(VARIABLE) or "0"
    if word not in _CHOICES:
        raise ArgumentError(f"{VARIABLE} must be one of {', '.join(_CHOICES)}; got {word!r}")
    if word != "0":
        _library()
    return word


@cache
def _library() -> Any:
    try:
        import cudnn
    except ModuleNotFoundError as error:
        if error.name != "cudnn":
            raise BackendError(f"nvidia-cudnn-frontend is installed but does not load: {error}")
        raise BackendError(_REMEDY)
    # the last two: libcudnn is missing or does not fit
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"nvidia-cudnn-frontend is installed but does not load: {error}; it needs cuDNN for "
            "the CUDA at hand: "
            "nvidia-cudnn-cu13 or nvidia-cudnn-cu12"
        )
    return cudnn


def takes(plan: Plan) -> bool:
    """Whether a convolution of this geometry goes to cuDNN, as far as its size tells; raises as
    ``choice`` does."""
    word = choice()
    if word == "0" or _precision() not in _ORDERS:
        return False
    sizes, o = plan.sizes, plan.sizes.o * plan.groups
    multiply_adds = o * plan.cells * sizes.c * plan.taps
    packed = sizes.c * plan.groups * sizes.h * sizes.w * sizes.n + o * plan.cells
    return word == "all" or (multiply_adds >= LARGE and multiply_adds >= MUCH * packed)


def _precision() -> str:
    """What ``ops.use_precision`` says here, where there is such a thing: "float32" else."""
    return str(getattr(dispatch, "precision", lambda: "float32")())


# --- graphs ---------------------------------------------------------------------------------------


def pads(plan: Plan) -> tuple[list[int], list[int]]:
    """Before and behind, for H and W. Alike on both sides where that gives the same result: more
    engines take that."""
    g = plan.sizes
    before, behind = [g.top, g.left], []
    for size, out, k, s, d, p in (
        (g.h, g.oh, g.kh, g.sh, g.dh, g.top),
        (g.w, g.ow, g.kw, g.sw, g.dw, g.left),
    ):
        reach = (k - 1) * d + 1
        alike = (size + 2 * p - reach) // s + 1 == out
        # Else as much as the last window needs: where that is less than nothing, inputs are left
        # over anyway.
        behind.append(p if alike else max(0, (out - 1) * s + reach - size - p))
    return before, behind


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """By cuDNN's names: image (N, C, H, W) of all groups, weight or filter, and loss, which is the
    result or its gradient."""
    g = plan.sizes
    o = g.o * plan.groups
    kernels = (o, g.c, g.kh, g.kw)
    image, loss = (g.n, g.c * plan.groups, g.h, g.w), (g.n, o, g.oh, g.ow)
    return {"image": image, "weight": kernels, "filter": kernels, "loss": loss}


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """In numbers, of a tensor whose axes lie in memory in this order."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return strides


@cache
def _handle(device: int) -> Any:
    """cuDNN's handle for the current device, which is ``device``."""
    return _library().create_handle()


def _build(kind: str, plan: Plan, dtype: str, precision: str, device: int) -> Any:
    cudnn = _library()
    order, data_type = _ORDERS[precision], getattr(cudnn.data_type, _TYPES[dtype])
    shapes = _shapes(plan)
    graph = cudnn.pygraph(
        io_data_type=data_type,
        intermediate_data_type=data_type,
        compute_data_type=data_type,
        handle=_handle(device),
    )

    inputs = {}
    for uid, name in enumerate(_INPUTS[kind], 1):
        given = graph.tensor(
            name=name,
            dim=list(shapes[name]),
            stride=_strides(shapes[name], order),
            data_type=data_type,
        )
        inputs[name] = given.set_uid(uid)
    g = plan.sizes
    before, behind = pads(plan)
    result = getattr(graph, f"conv_{kind}")(
        **inputs,
        pre_padding=before,
        post_padding=behind,
        stride=[g.sh, g.sw],
        dilation=[g.dh, g.dw],
        compute_data_type=data_type,
    )
    shape = shapes[_RESULT[kind]]
    result.set_output(True).set_dim(list(shape)).set_stride(_strides(shape, order)).set_data_type(
        data_type
    ).set_uid(3)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    # Only now: these mark plans, and before there are some they mark nothing.
    notes = _EXACT_NOTES if precision == "float32" else _NOTES
    graph.deselect_numeric_notes([getattr(cudnn.numerical_note, note) for note in notes])
    graph.deselect_workspace_greater_than(WORKSPACE)
    graph.check_support()
    graph.build_plans()
    return graph


def _graph(kind: str, plan: Plan, dtype: str) -> Any:
    """Built at first use; None where cuDNN has nothing for it, and while a stream is being
    captured, when nothing may be built."""
    import cupy as cp

    precision, device = _precision(), int(cp.cuda.Device().id)
    key = (kind, plan.sizes, plan.groups, dtype, precision, device)
    with _lock:
        if key in _graphs:
            return _graphs[key]
        if cp.cuda.get_current_stream().is_capturing():
            return None
        refusals = (_library().cudnnGraphNotSupportedError, RuntimeError, ValueError)
        try:
            _graphs[key] = _build(kind, plan, dtype, precision, device)
        except refusals as error:
            _log.warning(
                "cuDNN refuses %s of %s %s, which our kernel does: %s",
                kind,
                dtype,
                plan.sizes,
                error,
            )
            _graphs[key] = None
        return _graphs[key]


def _run(graph: Any, first: Array, second: Array, result: Array) -> None:
    """On the current stream, without waiting. The workspace goes back to CuPy's pool, which hands
    it out in the stream's order."""
    import cupy as cp

    with _lock:
        handle = _handle(int(cp.cuda.Device().id))
        _library().set_stream(handle=handle, stream=int(cp.cuda.get_current_stream().ptr))
        workspace = cp.empty(max(1, graph.get_workspace_size()), dtype=np.uint8)
        pointers = {
            uid: int(array.data.ptr) for uid, array in enumerate((first, second, result), 1)
        }
        graph.execute(pointers, int(workspace.data.ptr), handle=handle)


# --- packing --------------------------------------------------------------------------------------


def _packed(array: Array) -> Array:
    """(N, C, H, W), or a filter, of any strides -> the same where it lies as cuDNN is told that it
    does, else a copy."""
    import cupy as cp

    order = _ORDERS[_precision()]
    packed = cp.ascontiguousarray(array.transpose(order))
    if packed.data.ptr % _ALIGNED:  # a network's weights lie one after the other, with no gaps
        packed = packed.copy()
    return packed.transpose(np.argsort(order).tolist())


def _room(shape: Sequence[int], dtype: Any) -> Array:
    import cupy as cp

    order = _ORDERS[_precision()]
    return cp.empty([shape[axis] for axis in order], dtype=dtype).transpose(
        np.argsort(order).tolist()
    )


def _batch_last(array: Array) -> Array:
    """(N, C, H, W) -> (C, H, W, N), packed."""
    import cupy as cp

    return cp.ascontiguousarray(array.transpose(1, 2, 3, 0))


# --- convolution ----------------------------------------------------------------------------------


def forward(plan: Plan, xt: Array, weight: Array, bias: Array | None, relu: bool) -> Array | None:
    """xt (C, *S, N), weight (O, C/G, *K) -> y (O, OH, OW, N), packed. None where cuDNN can't."""
    import cupy as cp

    graph = _graph("fprop", plan, dtype_name(xt))
    if graph is None:
        return None
    shapes, g = _shapes(plan), plan.sizes
    x = _packed(xt.reshape(-1, g.h, g.w, g.n).transpose(_LAST))
    result = _room(shapes["loss"], xt.dtype)
    _run(graph, x, _packed(weight.reshape(shapes["filter"])), result)
    y = _batch_last(result)
    if bias is not None:
        cp.add(y, bias.reshape(-1, 1, 1, 1), out=y)
    return cp.maximum(y, 0, out=y) if relu else y


def gradients(
    plan: Plan,
    xt: Array,
    dyt: Array,
    y: Array | None,
    weight: Array,
    with_bias: bool,
    need_dx: bool,
) -> tuple[Array | None, Array, Array | None] | None:
    """xt (C, *S, N), dyt (O, *OUT, N) and, after ReLU, y like it -> dx as xt, dweight, dbias (O,).
    None where cuDNN can't."""
    import cupy as cp

    dtype = dtype_name(xt)
    graphs = [_graph(kind, plan, dtype) for kind in ("wgrad", *(["dgrad"] if need_dx else []))]
    if None in graphs:
        return None
    shapes, g = _shapes(plan), plan.sizes
    if y is not None:
        dyt = cp.where(y <= 0, dyt.dtype.type(0), dyt)
    dbias = dyt.reshape(dyt.shape[0], -1).sum(axis=1) if with_bias else None
    dy = _packed(dyt.reshape(-1, g.oh, g.ow, g.n).transpose(_LAST))
    x = _packed(xt.reshape(-1, g.h, g.w, g.n).transpose(_LAST))
    dweight = _room(shapes["filter"], xt.dtype)
    _run(graphs[0], x, dy, dweight)
    dweight = cp.ascontiguousarray(dweight).reshape(weight.shape)
    if not need_dx:
        return None, dweight, dbias
    dx = _room(shapes["image"], xt.dtype)
    _run(graphs[1], dy, _packed(weight.reshape(shapes["filter"])), dx)
    return _batch_last(dx).reshape(xt.shape), dweight, dbias
