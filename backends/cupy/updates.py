"""The optimizers' updates on CUDA (cuda/updates.cu): one launch per array. A network's parameters
are one array.

``clip_by_global_norm`` and ``all_finite`` use one launch per array for the sums, then one per array
or one in total.

Learning rates and counts are Python numbers or device arrays. Nothing is read from the device.
"""

from typing import Any

import numpy as np

from portacnn.backends.cupy.memory import THREADS, at_or_value, blocks_for, can, or_null
from portacnn.backends.cupy.nvrtc import Variant, kernel
from portacnn.runtime import Array, Kernel, backend_of, dtype_name

FILE = "updates.cu"
VARIANTS: list[Variant] = [(FILE, {})]
# blocks that sum an array; each block of the next launch adds their results
_PARTS = 256


def _fit(written: list[list[Array] | None], read: list[Array]) -> bool:
    """Return whether the kernels support these lists of arrays, written and read item by item."""
    lists = [arrays for arrays in written if arrays is not None]
    return all(
        can(*group) and all(array.flags.c_contiguous for array in group[:-1])
        for group in zip(*lists, read, strict=True)
    )


def _update(
    name: str,
    written: list[list[Array] | None],
    grads: list[Array],
    ok: Array | None,
    *numbers: Any,
) -> Any:
    """Launch once per parameter with its gradient and its state. None in ``written`` is an absent
    state.
    """
    if not _fit(written, grads):
        return NotImplemented
    for i, g in enumerate(grads):
        p, *state = (None if arrays is None else arrays[i] for arrays in written)
        arrays = p, backend_of(g).contiguous(g), *(or_null(array) for array in state), or_null(ok)
        real = g.dtype.type
        rest = (real(number) if type(number) is float else number for number in numbers)
        run = kernel(FILE, name, dtype_name(g))
        run(blocks_for(g.size), (THREADS,), (*arrays, *rest, np.int32(g.size)))
    return None


def _rate(lr: Any) -> tuple[Any, np.float64]:
    at, value = at_or_value(lr, "float64")
    return at, np.float64(value)


def sgd_update(
    params: list[Array],
    grads: list[Array],
    *,
    lr: Any,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> Any:
    return _update("sgd", [params], grads, ok, *_rate(lr), float(weight_decay))


def momentum_update(
    params: list[Array],
    grads: list[Array],
    velocity: list[Array],
    *,
    lr: Any,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    first: Any = False,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> Any:
    first_at, first = at_or_value(first, "bool")
    firsts = first_at, np.bool_(first)
    rule = np.float64(momentum), np.float64(dampening), np.bool_(nesterov)
    return _update(
        "momentum", [params, velocity], grads, ok, *_rate(lr), *firsts, float(weight_decay), *rule
    )


def adagrad_update(
    params: list[Array],
    grads: list[Array],
    square_sum: list[Array],
    *,
    lr: Any,
    eps: float,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> Any:
    return _update(
        "adagrad", [params, square_sum], grads, ok, *_rate(lr), float(weight_decay), float(eps)
    )


def rmsprop_update(
    params: list[Array],
    grads: list[Array],
    mean_square: list[Array],
    mean: list[Array] | None = None,
    velocity: list[Array] | None = None,
    *,
    lr: Any,
    alpha: float,
    eps: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    ok: Array | None = None,
) -> Any:
    numbers = *_rate(lr), float(weight_decay), np.float64(alpha), float(eps), float(momentum)
    return _update("rmsprop", [params, mean_square, mean, velocity], grads, ok, *numbers)


def adam_update(
    params: list[Array],
    grads: list[Array],
    mean: list[Array],
    mean_square: list[Array],
    *,
    lr: Any,
    beta1: float,
    beta2: float,
    eps: float,
    step: Any,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    ok: Array | None = None,
) -> Any:
    step_at, step = at_or_value(step, "int64")
    rule = (
        np.float64(weight_decay),
        np.float64(beta1),
        np.float64(beta2),
        float(eps),
        np.bool_(decoupled),
    )
    return _update(
        "adam", [params, mean, mean_square], grads, ok, *_rate(lr), step_at, np.int64(step), *rule
    )


def _parts(arrays: list[Array]) -> list[int]:
    """Return the number of blocks that sum each array."""
    return [min(blocks_for(array.size)[0], _PARTS) for array in arrays]


def _added_up(name: str, arrays: list[Array], dtype: str) -> Array:
    """Return the partial sums of the blocks of each array, concatenated."""
    import cupy as cp

    parts = _parts(arrays)
    sums, start = cp.empty((sum(parts),), dtype=dtype), 0
    for array, blocks in zip(arrays, parts, strict=True):
        memory, own = backend_of(array).contiguous(array), sums[start : start + blocks]
        kernel(FILE, name, dtype_name(array))(
            (blocks,), (THREADS,), (memory, own, np.int32(array.size))
        )
        start += blocks
    return sums


def clip_by_global_norm(grads: list[Array], max_norm: Any) -> Any:
    import cupy as cp

    if not can(*grads) or not all(g.flags.c_contiguous for g in grads):
        return NotImplemented
    sums = _added_up("square_sums", grads, "float64")
    norm = cp.empty((), dtype=grads[0].dtype)
    limit_at, limit = at_or_value(max_norm, "float64")
    numbers = sums, norm, limit_at, np.float64(limit), np.int32(sums.size)
    for g in grads:
        kernel(FILE, "clip", dtype_name(g))(
            blocks_for(g.size), (THREADS,), (g, *numbers, np.int32(g.size))
        )
    return norm


def all_finite(arrays: list[Array]) -> Any:
    """Compute ``all_finite``, but check every element, so that a large sum does not matter.
    Integers are finite.
    """
    import cupy as cp

    real = [array for array in arrays if array.dtype.kind not in "iub"]
    if not real or not all(can(array) for array in real):
        return NotImplemented
    met = _added_up("count_not_finite", real, "int32")
    ok = cp.empty((), dtype="bool")
    kernel(FILE, "none_met", dtype_name(real[0]))((1,), (THREADS,), (met, ok, np.int32(met.size)))
    return ok


KERNELS = {
    "sgd_update": Kernel(sgd_update),
    "momentum_update": Kernel(momentum_update),
    "adagrad_update": Kernel(adagrad_update),
    "rmsprop_update": Kernel(rmsprop_update),
    "adam_update": Kernel(adam_update),
    "clip_by_global_norm": Kernel(clip_by_global_norm),
    "all_finite": Kernel(all_finite),
}
