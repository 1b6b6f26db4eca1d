"""Make the public functions of an op for any number of spatial axes: ``conv`` -> ``conv1d``,
``conv2d``, ``conv3d``.

Notation: S stands for the spatial axes: W; H, W; or D, H, W. An argument that takes an integer per
axis also takes a single integer for all of them.
"""

from collections.abc import Callable
from functools import update_wrapper
from inspect import signature
from typing import Concatenate, ParamSpec, TypeVar

from portacnn.errors import ShapeError
from portacnn.ops.dispatch import check_arrays, check_call
from portacnn.ops.windows import AXES
from portacnn.runtime import Array, describe

P = ParamSpec("P")
R = TypeVar("R")


def faces(
    name: str, face: Callable[Concatenate[int, P], R]
) -> tuple[Callable[P, R], Callable[P, R], Callable[P, R]]:
    """Return the functions ``{name}1d``, ``{name}2d`` and ``{name}3d``: ``face`` with its first
    argument, ``axes``, filled in.

    They share its docstring, and their signature has the remaining parameters.
    """
    whole = signature(face)
    rest = whole.replace(parameters=list(whole.parameters.values())[1:])

    def bound(axes: int) -> Callable[P, R]:
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return face(axes, *args, **kwargs)
            except TypeError:
                check_call(f"{name}{axes}d", run, *args, **kwargs)
                raise

        update_wrapper(run, face)
        del run.__wrapped__  # type: ignore[attr-defined]
        run.__name__ = run.__qualname__ = f"{name}{axes}d"
        run.__signature__ = rest  # type: ignore[attr-defined]
        return run

    return bound(1), bound(2), bound(3)


def check_input(
    name: str, axes: int | None, x: Array, *, linear: bool = False, **others: Array | None
) -> None:
    """Check that x is a floating-point array (N, C, *S) and that the other arrays match its
    library, device and dtype.

    ``axes`` is the number of spatial axes; None allows any number. ``linear`` allows complex
    arrays.

    Raises:
        ArrayError, ShapeError: with the name of the op.
    """
    check_arrays(name, linear=linear, **{"x": x, **others})
    if x.ndim < 3 if axes is None else x.ndim != axes + 2:
        expected = "*S" if axes is None else AXES[axes]
        raise ShapeError(
            f"expected an input (N, C, {expected}), got {x.ndim} axes (input {describe(x)})", name
        )
