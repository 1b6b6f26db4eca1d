"""Compare every kernel of a backend with the portable op on NumPy in float64, with random shapes: a
section of ``gpu_check.py``.

``portacnn/testing/examples.py`` says how to draw the arguments of each op; a kernel that is not
there is reported. Arrays are drawn in float64 and rounded to the dtype that the kernel gets, so
that both compute from the same numbers.
"""

from collections.abc import Callable
from contextlib import nullcontext
from inspect import signature
from typing import Any

import numpy as np

from gpu.tools import Gpu, Section, add_root

add_root()

from portacnn.ops import use_kernels  # noqa: E402
from portacnn.ops.dispatch import OPS  # noqa: E402
from portacnn.ops.windows import Windows  # noqa: E402
from portacnn.runtime import Backend, Kernel  # noqa: E402
from portacnn.testing import examples  # noqa: E402
from portacnn.testing.examples import Arguments, Example, Random  # noqa: E402

WIDER = 10.0
"""Times what the table allows a float32 result: a GPU's sums are longer here."""
LEAST, MOST = 6, 60  # examples of a kernel


def limit(example: Example, dtype: str) -> float:
    """How far a result may be off, relative to its largest number."""
    return WIDER * example.float32 if dtype == "float32" else 1e-10


# --- one call -------------------------------------------------------------------------------------


def call(
    home: Backend, kernel: Kernel, op: str, arguments: Arguments, dtype: str, last: bool, seed: int
) -> Any:
    """Return a kernel's results, the arguments it writes, and the results of its backward pass, as
    NumPy arrays.

    Args:
        dtype: of the floating-point arrays.
        last: whether they are stored batch-last.

    Returns:
        NotImplemented if the kernel declines.
    """

    def place(array: np.ndarray) -> Any:
        if not last or array.ndim < 3:
            return home.asarray(array)
        turned = home.asarray(np.moveaxis(array, 0, -1).copy())
        return home.xp.permute_dims(turned, (array.ndim - 1, *range(array.ndim - 1)))

    given = examples.as_given(arguments, lambda array: array.astype(dtype))
    placed = examples.mapped(given, place)
    result = examples.call(kernel.forward, _kept(placed, kernel, True))
    if result is NotImplemented:
        return result
    if kernel.backward is None:
        found = [result]
    else:
        y, saved = result
        dy: Any = 0.7 if y.ndim == 0 else place(_gradient(y.shape, seed).astype(dtype))
        portable: Any = OPS[op].portable_backward
        found = [y, kernel.backward(dy, saved)]
        needs = [name for name in signature(portable).parameters if name.startswith("need_")]
        for left_out in (
            (needs[:1], needs[1:]) if needs else ()
        ):  # as below, and within, what is frozen
            _, saved = examples.call(kernel.forward, _kept(placed, kernel, True))
            some = kernel.backward(dy, saved, **dict.fromkeys(left_out, False))
            if any(some[needs.index(name)] is not None for name in left_out):
                raise AssertionError(f"{left_out} = False gave a gradient")
            found.append(some)
        quick, nothing = examples.call(kernel.forward, _kept(placed, kernel, False))
        if nothing is not None:
            raise AssertionError("keep=False returned a cache")
        found.append(quick)
    written = [value for word, value in placed.items() if word not in examples.STATE]
    return [home.to_host(array) for array in examples.arrays_of([found, written])]


def _kept(arguments: Arguments, kernel: Kernel, keep: bool) -> Arguments:
    return arguments if kernel.backward is None else {**arguments, "keep": keep}


def _gradient(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return Random(seed).eighths(*shape)


def compare(
    home: Backend, kernel: Kernel, op: str, arguments: Arguments, dtype: str, last: bool, seed: int
) -> float | None:
    """Return the kernel's error: the largest error relative to the largest value, of the worst
    result. None if it declines.

    Raises:
        AssertionError: if dtypes, shapes, integers or booleans differ, or a repetition has other
            bits.
    """
    found = call(home, kernel, op, arguments, dtype, last, seed)
    if found is NotImplemented:
        return None
    rounded = examples.as_given(arguments, lambda array: array.astype(dtype).astype(np.float64))
    with use_kernels("reference"):
        portable = Kernel(OPS[op].forward, OPS[op].portable_backward)
        wanted = call(_numpy(), portable, op, rounded, "float64", last, seed)
    again = call(home, kernel, op, arguments, dtype, last, seed)
    if len(found) != len(wanted):
        raise AssertionError(f"{len(found)} results, expected {len(wanted)}")
    worst = 0.0
    for number, (got, right, twin) in enumerate(zip(found, wanted, again, strict=True)):
        kind = np.dtype(dtype) if right.dtype.kind == "f" else right.dtype
        if (got.dtype, got.shape) != (kind, right.shape):
            raise AssertionError(
                f"result {number}: expected {kind} {right.shape}, got {got.dtype} {got.shape}"
            )
        if got.tobytes() != twin.tobytes():
            raise AssertionError(f"result {number} has other bits when it is computed again")
        if right.dtype.kind != "f":
            if not np.array_equal(got, right):
                raise AssertionError(
                    f"result {number} differs in {int((got != right).sum())} of {right.size} places"
                )
            continue
        fine = np.isfinite(right)
        if not np.array_equal(np.isfinite(got), fine):
            raise AssertionError(
                f"result {number} is not finite in {int((~np.isfinite(got)).sum())} places"
            )
        error = np.abs(np.where(fine, got, 0.0) - np.where(fine, right, 0.0)).max(initial=0.0)
        worst = max(worst, float(error / (np.abs(right[fine]).max(initial=0.0) or 1.0)))
    return worst


def _numpy() -> Backend:
    from portacnn import resolve

    return resolve("numpy")


# --- the section ----------------------------------------------------------------------------------


def kernels(section: Section) -> None:
    gpu = Gpu(section.device)
    check(section, gpu.home, dict(gpu.home.kernels["native"]), gpu.poisoned)


def check(
    section: Section,
    home: Backend,
    table: dict[str, Kernel],
    poisoned: Callable[[], Any] = nullcontext,
) -> None:
    """Compare every kernel of the table, with the same share of the time each.

    Args:
        poisoned: a context in which new memory is filled with NaN.
    """
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    section.figures["seed"] = seed
    names = sorted(table)
    section.expect(names, f"{home} has no kernels")
    for place, name in enumerate(names):
        if section.expect(
            examples.examples_of(name),
            f"{name}: put a row for it into portacnn/testing/examples.py",
        ):
            share = max(section.left, 0.0) / (len(names) - place)
            with section.caught(name):
                _check_one(section, home, name, table[name], seed, share, poisoned)


def _check_one(
    section: Section,
    home: Backend,
    name: str,
    kernel: Kernel,
    seed: int,
    share: float,
    poisoned: Callable[[], Any],
) -> None:
    end = section.left - share
    worst: dict[str, float] = {}
    compared, declined = 0, 0
    least = 3 if section.quick else LEAST
    rows = list(examples.examples_of(name).values())
    for number in range(MOST):
        if compared >= least and (section.quick or section.left < end):
            break
        if section.left <= 0:
            section.expect(compared, f"{name}: not enough time")
            break
        large = not section.quick and number % 3 == 2
        random = Random(seed + number, "large" if large else "medium")
        example, dtype = rows[number % len(rows)], "float64" if number % 3 == 1 else "float32"
        arguments, last = example.draw(random), random.of(True, False)
        with poisoned():
            try:
                error = compare(home, kernel, name, arguments, dtype, last, seed)
            except AssertionError as wrong:
                section.expect(
                    False,
                    f"{name} (example {seed + number}, {dtype}): {wrong}; {describe(arguments)}",
                )
                break
        if error is None:
            declined += 1
            continue
        compared += 1
        worst[dtype] = max(worst.get(dtype, 0.0), error)
        if not section.expect(
            error <= limit(example, dtype),
            f"{name} (example {seed + number}): off by {error:.1e} in {dtype}; "
            f"{describe(arguments)}",
        ):
            break
    section.expect(compared, f"{name}: declined all {declined} examples, so nothing was compared")
    section.row(
        kernel=name,
        compared=compared,
        declined=declined,
        **{dtype: worst.get(dtype) for dtype in ("float32", "float64")},
    )


def describe(arguments: Arguments) -> str:
    """Shapes for arrays, values for the rest."""

    def word(value: Any) -> str:
        if isinstance(value, np.ndarray):
            return "x".join(map(str, value.shape)) or f"{value!r}"
        if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
            return f"[{', '.join(map(word, value))}]"
        if isinstance(value, Windows):
            return (
                f"size {value.size} kernel {value.kernel} stride {value.stride} pads "
                f"{value.pads} dilation {value.dilation}"
            )
        return repr(value)

    return ", ".join(f"{name}={word(value)}" for name, value in arguments.items())
