"""Ops whose arguments include numbers that change from step to step: dropout's mask and the
optimizers' updates. The numbers become arrays, so that one compiled function serves all steps."""

from functools import wraps
from inspect import signature
from typing import Any

import jax.numpy as jnp
import numpy as np

from portacnn.backends.jax.arrays import JaxArray
from portacnn.backends.jax.compiled import compiled, run
from portacnn.ops import update
from portacnn.ops.dispatch import OPS
from portacnn.ops.masks import LAST_SHIFT, ROUNDS, WORD, drop
from portacnn.runtime import Kernel

_CHANGING = {"lr": np.float64, "step": np.int64, "first": np.int64}


def _as_arrays(values: dict[str, Any], like: JaxArray) -> dict[str, Any]:
    """Return arguments by name, with the numbers that change as 0-dimensional arrays."""
    xp = JaxArray.xp
    return {
        name: xp.asarray(np.bool_(value) if isinstance(value, bool) else kind(value), device=device)
        if (kind := _CHANGING.get(name)) is not None and not hasattr(value, "shape")
        else value
        for device in (like.device,)
        for name, value in values.items()
    }


def _with_arrays(name: str) -> Kernel:
    """Return the portable op with its changing numbers as arrays."""
    portable = OPS[name]
    names = list(signature(portable.forward).parameters)

    @wraps(portable.forward)
    def forward(*args: Any, **options: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | options
        one = args[0][0] if isinstance(args[0], list) else args[0]
        values = _as_arrays(given, one)
        if name == "drop":
            values["key"] = tuple(JaxArray.xp.asarray(np.int64(word)) for word in values["key"])
        positional = [values.pop(word) for word in names[: len(args)]]
        return run(portable.forward, *positional, **values)

    backward = portable.portable_backward
    return Kernel(forward, None if backward is None else compiled(backward))


def _round(x: Any, shift: int, factor: int) -> Any:
    return (x ^ (x >> np.uint32(shift))) * np.uint32(factor % 2**32)


@compiled
def kept(like: Any, length: int, first: Any, second: Any, threshold: int) -> Any:
    """See ``portacnn.ops.masks.kept``: the same hash in 32-bit arithmetic, which wraps around."""
    if threshold > WORD:
        return JaxArray(jnp.zeros((first.shape[0], length), dtype=bool))
    index = jnp.arange(length, dtype=jnp.uint32)[None, :]
    x = _round(index ^ first.held.astype(jnp.uint32)[:, None], *ROUNDS[0])
    x = x ^ second.held.astype(jnp.uint32)[:, None]
    for shift, factor in ROUNDS[1:]:
        x = _round(x, shift, factor)
    x = x ^ (x >> np.uint32(LAST_SHIFT))
    return JaxArray(x >= np.uint32(threshold))


KERNELS = {
    "kept": Kernel(kept),
    drop.name: _with_arrays(drop.name),
    **{
        name: _with_arrays(name)
        for name, found in OPS.items()
        if found.forward.__module__ == update.__name__
        and "lr" in signature(found.forward).parameters
    },
}
