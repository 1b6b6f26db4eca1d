"""Compare every kernel of a backend with the portable op on NumPy in float64, with random shapes: a
section of ``gpu_check.py``.

``gpu/examples.py`` draws the arguments of each op that has a kernel; a missing one is reported.
Arrays are drawn in float64 and rounded to the kernel's dtype, so that both compute from the same
values.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from inspect import signature
from typing import Any

import numpy as np

from gpu.examples import EXAMPLES, Draw, Example
from gpu.tools import Gpu, Section, add_root

add_root()

from portacnn.ops import use_kernels  # noqa: E402
from portacnn.ops.dispatch import OPS  # noqa: E402
from portacnn.ops.windows import Windows  # noqa: E402
from portacnn.runtime import Backend, Kernel  # noqa: E402

LIMIT = {"float32": 1e-4, "float64": 1e-10}
"""The largest allowed error, relative to the largest value of a result."""
LEAST, MOST = 6, 60  # examples per kernel


# --- one call -------------------------------------------------------------------------------------


def mapped(value: Any, change: Callable[[np.ndarray], Any]) -> Any:
    """Return ``value`` with ``change`` applied to its arrays, including those in lists, tuples and
    dictionaries.
    """
    if isinstance(value, dict):
        return {name: mapped(item, change) for name, item in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(mapped(item, change) for item in value)
    return change(value) if isinstance(value, np.ndarray) else value


def arrays_of(value: Any) -> Iterator[Any]:
    """Yield all arrays in ``value``, of any library, in order."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from arrays_of(item)
    elif hasattr(value, "shape"):
        yield value


def call(
    home: Backend, kernel: Kernel, name: str, example: Example, dtype: str, last: bool, seed: int
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

    def floats(array: np.ndarray) -> Any:
        return place(array.astype(dtype) if array.dtype.kind == "f" else array)

    args, options = mapped(example.args, floats), mapped(example.options, home.asarray)
    if name == "softmax_cross_entropy" and options["weight"] is not None:
        options["weight"] = floats(example.options["weight"])
    result = kernel.forward(*args, **options)
    if result is NotImplemented:
        return result
    if kernel.backward is None:
        found = [result]
    else:
        y, saved = result
        found = [y]
        if example.backward:
            dy: Any = 0.7 if y.ndim == 0 else floats(_gradient(y.shape, example, seed))
            portable: Any = OPS[name].portable_backward
            need_dx = {"need_dx": True} if "need_dx" in signature(portable).parameters else {}
            found.append(kernel.backward(dy, saved, **need_dx))
            if need_dx:
                _, saved = kernel.forward(*args, **options)
                dx, *others = kernel.backward(dy, saved, need_dx=False)
                if dx is not None:
                    raise AssertionError("need_dx=False returned a dx")
                found.append(others)
        quick, nothing = kernel.forward(*args, **{**options, "keep": False})
        if nothing is not None:
            raise AssertionError("keep=False returned a cache")
        found.append(quick)
    return [home.to_host(array) for array in arrays_of([found, list(args)])]


def _gradient(shape: tuple[int, ...], example: Example, seed: int) -> np.ndarray:
    return Draw(seed, False).eighths(*shape)


def rounded(example: Example, dtype: str) -> Example:
    """Return the example with its values rounded to ``dtype``, in float64."""

    def change(array: np.ndarray) -> np.ndarray:
        return array.astype(dtype).astype(np.float64) if array.dtype.kind == "f" else array

    return example._replace(args=mapped(example.args, change))


def compare(
    home: Backend, kernel: Kernel, name: str, example: Example, dtype: str, last: bool, seed: int
) -> float | None:
    """Return the kernel's error: the largest error relative to the largest value, of the worst
    result. None if it declines.

    Raises:
        AssertionError: if dtypes, shapes, integers or booleans differ, or a repetition has other
            bits.
    """
    found = call(home, kernel, name, example, dtype, last, seed)
    if found is NotImplemented:
        return None
    numpy = _numpy()
    op = OPS[name]
    with use_kernels("reference"):
        portable = Kernel(op.forward, op.portable_backward)
        wanted = call(numpy, portable, name, rounded(example, dtype), "float64", last, seed)
    again = call(home, kernel, name, example, dtype, last, seed)
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
            name in EXAMPLES, f"{name}: has no examples; add them to gpu/examples.py"
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
    for number in range(MOST):
        if compared >= least and (section.quick or section.left < end):
            break
        if section.left <= 0:
            section.expect(compared, f"{name}: not enough time")
            break
        draw = Draw(seed + number, large=not section.quick and number % 3 == 2)
        example, dtype, last = (
            EXAMPLES[name](draw),
            "float64" if number % 3 == 1 else "float32",
            draw.of(True, False),
        )
        with poisoned():
            try:
                error = compare(home, kernel, name, example, dtype, last, seed)
            except AssertionError as wrong:
                section.expect(
                    False,
                    f"{name} (example {seed + number}, {dtype}): {wrong}; {describe(example)}",
                )
                break
        if error is None:
            declined += 1
            continue
        compared += 1
        worst[dtype] = max(worst.get(dtype, 0.0), error)
        if not section.expect(
            error <= LIMIT[dtype],
            f"{name} (example {seed + number}): off by {error:.1e} in {dtype}; {describe(example)}",
        ):
            break
    section.expect(compared, f"{name}: declined all {declined} examples, so nothing was compared")
    section.row(
        kernel=name,
        compared=compared,
        declined=declined,
        **{dtype: worst.get(dtype) for dtype in LIMIT},
    )


def describe(example: Example) -> str:
    """Describe the arguments: shapes of arrays, values of the rest."""

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

    options = [f"{name}={word(value)}" for name, value in example.options.items()]
    return ", ".join([*map(word, example.args), *options])
