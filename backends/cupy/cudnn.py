"""Convolution on CUDA with cuDNN's graphs (package nvidia-cudnn-frontend), for sizes at which
portacnn's kernels are slower.

None of this has run on a GPU yet, so it is off unless ``PORTACNN_CUDNN`` requests it.

Notation as in conv.py: N batch, C in-channels and O out-channels of one group, G groups, H/W and
OH/OW the axes in and out. cuDNN derives the number of groups from the channels of image and filter.
It needs the batch first, so arrays stored (C, H, W, N) are repacked before and after; ``takes``
includes this cost.
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
    f"{VARIABLE} requests cuDNN, but nvidia-cudnn-frontend is not installed: pip install "
    '"portacnn[cudnn]" '
    f'(or "portacnn[cudnn12]" with "portacnn[cuda12]"), or unset {VARIABLE}'
)

LARGE = 2**31
MUCH = 256
"""cuDNN is used from LARGE multiply-adds on, if there are at least MUCH per repacked element.

Estimated, not measured. At 15e12 multiply-adds per second for our kernel and 24e12 for cuDNN's, a
multiply-add saves 2.5e-14 s. Repacking costs about four more launches of 10 microseconds each, and
8 bytes read and written at 1e12 bytes per second for every element of image and result. The
launches are amortized by 1.6e9 multiply-adds, the transfers by 320 per element. The constants are
the nearest powers of two.
"""
WORKSPACE = 512 * 2**20  # bytes; plans that need more are rejected

_ORDERS = {"float32": (0, 1, 2, 3), "tf32": (0, 2, 3, 1)}
"""The memory order of (N, C, H, W) by precision: tensor cores read adjacent channels, other units
planes.

bfloat16 and float16 convolutions always use our kernels."""
_ALIGNED = 16  # bytes; the alignment of tensors that cuDNN assumes by default
_LAST = (3, 0, 1, 2)  # (C, H, W, N) -> (N, C, H, W)
_TYPES = {"float32": "FLOAT", "float64": "DOUBLE"}
_NOTES = (
    "NONDETERMINISTIC",
    "REDUCED_PRECISION_REDUCTION",
    "DOWN_CONVERT_INPUTS",
    "WINOGRAD_TILE_13x13",
)
_EXACT_NOTES = (*_NOTES, "TENSOR_CORE")
"""Numerical notes of engines that are excluded. Excluding TENSOR_CORE avoids rounding float32 to
TF32."""

_INPUTS = {"fprop": ("image", "weight"), "dgrad": ("loss", "filter"), "wgrad": ("image", "loss")}
_RESULT = {"fprop": "loss", "dgrad": "image", "wgrad": "filter"}
"""cuDNN's operations, the names of their two inputs, and the tensor whose shape their result has.
The identifiers are 1, 2 and 3."""

_log = logging.getLogger("portacnn")
_lock = Lock()  # a handle and its plans serve one thread at a time
_graphs: dict[tuple, Any] = {}
"""The graphs by case; None if cuDNN does not support it. They are never dropped, because a captured
CUDA graph may still use their code."""


# --- selection ------------------------------------------------------------------------------------


@cache
def choice() -> str:
    """Return the value of ``PORTACNN_CUDNN``: "0" never, "1" large convolutions, "all" every
    convolution (for measurements).

    Raises:
        ArgumentError: if the value is another string.
        BackendError: if cuDNN is requested and unavailable. The message names the fix.
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
    # OSError and RuntimeError: libcudnn is missing or of another version
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"nvidia-cudnn-frontend is installed but does not load: {error}; install cuDNN for "
            "your CUDA version: nvidia-cudnn-cu13 or nvidia-cudnn-cu12"
        )
    return cudnn


def takes(plan: Plan) -> bool:
    """Return whether a convolution of this size uses cuDNN. Raises the errors of ``choice``."""
    word = choice()
    if word == "0" or _precision() not in _ORDERS:
        return False
    sizes, o = plan.sizes, plan.sizes.o * plan.groups
    multiply_adds = o * plan.cells * sizes.c * plan.taps
    packed = sizes.c * plan.groups * sizes.h * sizes.w * sizes.n + o * plan.cells
    return word == "all" or (multiply_adds >= LARGE and multiply_adds >= MUCH * packed)


def _precision() -> str:
    """Return the precision set by ``ops.use_precision``, by default "float32"."""
    return str(getattr(dispatch, "precision", lambda: "float32")())


# --- graphs ---------------------------------------------------------------------------------------


def pads(plan: Plan) -> tuple[list[int], list[int]]:
    """Return the padding before and after H and W. It is symmetric if that has the same result,
    because more engines support it.
    """
    g = plan.sizes
    before, behind = [g.top, g.left], []
    for size, out, k, s, d, p in (
        (g.h, g.oh, g.kh, g.sh, g.dh, g.top),
        (g.w, g.ow, g.kw, g.sw, g.dw, g.left),
    ):
        reach = (k - 1) * d + 1
        alike = (size + 2 * p - reach) // s + 1 == out
        # Otherwise as much as the last window needs; if that is negative, some inputs are not read.
        behind.append(p if alike else max(0, (out - 1) * s + reach - size - p))
    return before, behind


def _shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes by cuDNN's names: image (N, C, H, W) of all groups, weight or filter, and
    loss (the result or its gradient).
    """
    g = plan.sizes
    o = g.o * plan.groups
    kernels = (o, g.c, g.kh, g.kw)
    image, loss = (g.n, g.c * plan.groups, g.h, g.w), (g.n, o, g.oh, g.ow)
    return {"image": image, "weight": kernels, "filter": kernels, "loss": loss}


def _strides(shape: Sequence[int], order: Sequence[int]) -> list[int]:
    """Return the strides, in elements, of a tensor whose axes lie in memory in this order."""
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    return strides


@cache
def _handle(device: int) -> Any:
    """Return cuDNN's handle for the current device, which is ``device``."""
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
    # These calls mark plans, so they must follow the creation of plans.
    notes = _EXACT_NOTES if precision == "float32" else _NOTES
    graph.deselect_numeric_notes([getattr(cudnn.numerical_note, note) for note in notes])
    graph.deselect_workspace_greater_than(WORKSPACE)
    graph.check_support()
    graph.build_plans()
    return graph


def _graph(kind: str, plan: Plan, dtype: str) -> Any:
    """Return the cached graph, built on first use. None if cuDNN does not support the case, or
    during a capture, when nothing may be built.
    """
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
                "cuDNN does not support %s of %s %s, so portacnn's own kernel is used: %s",
                kind,
                dtype,
                plan.sizes,
                error,
            )
            _graphs[key] = None
        return _graphs[key]


def _run(graph: Any, first: Array, second: Array, result: Array) -> None:
    """Execute on the current stream without waiting. The workspace returns to CuPy's pool, which
    reuses it in stream order.
    """
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
    """Return the array (N, C, H, W), or filter, with cuDNN's strides and alignment. Copies if
    necessary.
    """
    import cupy as cp

    order = _ORDERS[_precision()]
    packed = cp.ascontiguousarray(array.transpose(order))
    if packed.data.ptr % _ALIGNED:  # a network's weights are adjacent, so one may be unaligned
        packed = packed.copy()
    return packed.transpose(np.argsort(order).tolist())


def _empty(shape: Sequence[int], dtype: Any) -> Array:
    """Allocate an array with cuDNN's strides."""
    import cupy as cp

    order = _ORDERS[_precision()]
    return cp.empty([shape[axis] for axis in order], dtype=dtype).transpose(
        np.argsort(order).tolist()
    )


def _batch_last(array: Array) -> Array:
    """Copy (N, C, H, W) to (C, H, W, N)."""
    import cupy as cp

    return cp.ascontiguousarray(array.transpose(1, 2, 3, 0))


# --- convolution ----------------------------------------------------------------------------------


def forward(plan: Plan, xt: Array, weight: Array, bias: Array | None, relu: bool) -> Array | None:
    """Return y (O, OH, OW, N) for xt (C, *S, N) and weight (O, C/G, *K). None if cuDNN does not
    support the case.
    """
    import cupy as cp

    graph = _graph("fprop", plan, dtype_name(xt))
    if graph is None:
        return None
    shapes, g = _shapes(plan), plan.sizes
    x = _packed(xt.reshape(-1, g.h, g.w, g.n).transpose(_LAST))
    result = _empty(shapes["loss"], xt.dtype)
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
    need: tuple[bool, bool, bool],
) -> tuple[Array | None, Array | None, Array | None] | None:
    """Return dx like xt, dweight and dbias (O,) for xt (C, *S, N), dyt (O, *OUT, N) and, after
    ReLU, y; None for those that ``need``, in this order, leaves out. None if cuDNN does not support
    the case.
    """
    import cupy as cp

    need_dx, need_dweight, need_dbias = need
    dtype = dtype_name(xt)
    kinds = [kind for kind, needed in (("wgrad", need_dweight), ("dgrad", need_dx)) if needed]
    graphs = {kind: _graph(kind, plan, dtype) for kind in kinds}
    if None in graphs.values():
        return None
    shapes, g = _shapes(plan), plan.sizes
    if y is not None:
        dyt = cp.where(y <= 0, dyt.dtype.type(0), dyt)
    dbias = dyt.reshape(dyt.shape[0], -1).sum(axis=1) if need_dbias else None
    dy = _packed(dyt.reshape(-1, g.oh, g.ow, g.n).transpose(_LAST))
    dweight = None
    if need_dweight:
        x = _packed(xt.reshape(-1, g.h, g.w, g.n).transpose(_LAST))
        dweight = _empty(shapes["filter"], xt.dtype)
        _run(graphs["wgrad"], x, dy, dweight)
        dweight = cp.ascontiguousarray(dweight).reshape(weight.shape)
    if not need_dx:
        return None, dweight, dbias
    dx = _empty(shapes["image"], xt.dtype)
    _run(graphs["dgrad"], dy, _packed(weight.reshape(shapes["filter"])), dx)
    return _batch_last(dx).reshape(xt.shape), dweight, dbias
