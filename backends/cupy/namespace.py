"""CuPy's array API namespace, without operations that must not happen during the capture of a step.

It is array-api-compat's namespace except for four functions. Two synchronize with the device:
compat's ``clip`` and ``sign`` write through a mask, and CuPy counts the true elements of a mask on
the host. Two transfer: to join more than 8 arrays, CuPy copies a table of their addresses from
pinned memory. In a captured step this would record a copy from the host and an event that never
completes, and CuPy would not reuse pinned memory any more. On the null stream, which cannot be
captured, the table is faster and is kept. The steps before a capture run on their own stream, so
they use the functions of the captured step and compile what it needs.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from types import ModuleType
from typing import Any

from portacnn.runtime import Array

_JOINED_AT_ONCE = 8  # arrays that cupy.concatenate joins without a table


@cache
def namespace(compat: ModuleType) -> Any:
    """Return ``array_api_compat.cupy`` with the functions of this file instead of its own."""
    import cupy as cp

    def clip(x: Array, /, min: Any = None, max: Any = None) -> Array:
        scalars = all(bound is None or isinstance(bound, int | float) for bound in (min, max))
        if x.dtype.kind != "f" or not scalars or min is max is None:
            return compat.clip(x, min, max)
        y = x if min is None else cp.maximum(x, min)
        return y if max is None else cp.minimum(y, max)

    def sign(x: Array, /) -> Array:
        if x.dtype.kind != "f":
            return compat.sign(x)
        return cp.where(x > 0, 1.0, cp.where(x < 0, -1.0, x))  # keeps NaN, unlike cupy.sign

    def concat(arrays: Sequence[Array], /, *, axis: int | None = 0) -> Array:
        if len(arrays) <= _JOINED_AT_ONCE or cp.cuda.get_current_stream().ptr == 0:
            return cp.concatenate(arrays, axis=axis)
        if axis is None:
            return concat([cp.ravel(array) for array in arrays], axis=0)
        first, axis = arrays[0], axis % arrays[0].ndim
        ends = list(accumulate(array.shape[axis] for array in arrays))
        shape = (*first.shape[:axis], ends[-1], *first.shape[axis + 1 :])
        joined = cp.empty(shape, dtype=cp.result_type(*arrays))
        for array, end in zip(arrays, ends, strict=True):
            joined[(slice(None),) * axis + (slice(end - array.shape[axis], end),)] = array
        return joined

    def stack(arrays: Sequence[Array], /, *, axis: int = 0) -> Array:
        return concat([cp.expand_dims(array, axis) for array in arrays], axis=axis)

    ours = ModuleType(compat.__name__, compat.__doc__)
    vars(ours).update(vars(compat))
    vars(ours).update(clip=clip, sign=sign, concat=concat, stack=stack)
    return ours
