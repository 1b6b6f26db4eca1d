"""What the tests of ops share: arrays in every memory layout, and what is asked of every result and
every refusal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from portacnn import ops
from portacnn.backends import threads
from portacnn.backends.numpy import columns, grouped, pointwise
from portacnn.backends.numpy import conv as numpy_conv
from portacnn.errors import ArrayError
from portacnn.ops import use_kernels
from portacnn.runtime import Array, resolve
from portacnn.testing import arrays as kit
from portacnn.testing.gradients import check_slope
from support.matrix import Here

DTYPES = ("float32", "float64")
TOLERANCE = {"float32": 1e-5, "float64": 1e-11}  # of values of about 1
LAYOUTS = kit.LAYOUTS


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def distinct(*shape: int, seed: int = 0) -> np.ndarray:
    """No two numbers alike, or nearer than 0.1: where a maximum or a kink must not be met by
    accident."""
    count = int(np.prod(shape))
    return (np.random.default_rng(seed).permutation(count).reshape(shape) - count // 2 + 0.5) / 10


def laid_out(here: Here, host: Any, dtype: str | None = None, layout: str = "packed") -> Array:
    """``host`` on the backend under test: the same shape and values, in memory as ``layout``
    says."""
    return kit.laid_out(here.backend, host, layout, lambda array: here.array(array, dtype))


def agree(
    here: Here, got: Array, expected: Any, like: Array, tolerance: float | None = None
) -> None:
    """``got`` has these values, and the library, device and dtype of ``like``."""
    assert type(got) is type(like)
    assert got.device == like.device
    assert got.dtype == like.dtype
    host, expected = here.host(got), np.asarray(expected)
    assert host.shape == expected.shape
    limit = TOLERANCE[str(host.dtype)] if tolerance is None else tolerance
    finite = np.abs(expected[np.isfinite(expected)])
    np.testing.assert_allclose(
        host, expected, rtol=limit, atol=limit * max(1.0, finite.max(initial=0.0))
    )


@contextmanager
def untouched(here: Here, *arrays: Array | None) -> Iterator[None]:
    """The arrays hold afterwards, bit for bit, what they held before."""
    given = [array for array in arrays if array is not None]
    before = [here.host(array).tobytes() for array in given]
    yield
    assert [here.host(array).tobytes() for array in given] == before


def slopes_agree(
    gradient: np.ndarray, loss: Callable[[np.ndarray], float], host: np.ndarray
) -> None:
    """``gradient`` is that of ``loss`` at ``host``: to 1e-6 by central differences in float64,
    along directions of which each changes all elements."""
    check_slope(gradient, loss, host, "the gradient")


def gradient_agrees(
    here: Here, gradient: Array, loss: Callable[[Array], Array], host: np.ndarray
) -> None:
    """As ``slopes_agree``, for a loss of an array on the backend that is a 0-d array."""
    slopes_agree(here.host(gradient), lambda a: float(here.host(loss(here.array(a)))), host)


def mixtures(layout: str, count: int = 3) -> set[tuple[str, ...]]:
    """For so many arrays: each of them alone in this layout, and all of them."""
    alone = {tuple(layout if i == at else "packed" for i in range(count)) for at in range(count)}
    return alone | {(layout,) * count}


def face(kind: str, axes: int) -> tuple[Any, Any]:
    """The public op of so many spatial axes, and its backward."""
    return getattr(ops, f"{kind}{axes}d"), getattr(ops, f"{kind}{axes}d_backward")


def choices(here: Here) -> tuple[str, ...]:
    """What ``use_kernels`` takes where it makes a difference on this backend; the portable ops come
    last."""
    _, *others = [*here.backend.kernels, "reference"]
    return ("auto", *others)


def with_each_kernel(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test with every set of overrides that the backend has and, where it has any, once more
    with the portable ops."""

    @wraps(test)
    def run(*args: Any, backend: Here, **kwargs: Any) -> None:
        for choice in choices(backend):
            try:
                with use_kernels(choice):
                    test(*args, backend=backend, **kwargs)
            except BaseException as error:
                error.add_note(f"with use_kernels({choice!r})")
                raise

    return run


@contextmanager
def pieces_of(size: int) -> Iterator[None]:
    """NumPy's convolutions within so many bytes: their columns, blocks of products, and the panels
    where numba is here. They remember how they cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "tile_bytes", lambda: size)
        patch.setattr(columns, "_DEPTH", 8)
        patch.setattr(columns, "_ROWS", 8)
        patch.setattr(numpy_conv, "_AT_ONCE", 0)
        patch.setattr(numpy_conv, "_FEWEST", 1)
        patch.setattr(pointwise, "_BLOCK", 1)
        patch.setattr(pointwise, "_FEWEST", 3)
        patch.setattr(grouped, "_NEAR", size)
        patch.setattr(grouped, "_SHORT", size % 100)
        cuts = [columns.tiles, pointwise._blocks]
        if find_spec("numba") is not None:
            from portacnn.backends.numba import bands, panels

            patch.setattr(panels, "_NEAR", size)
            patch.setattr(bands, "_NEAR", size)
            cuts += [panels.panel_of, bands.band_of, bands.phases_of]
        try:
            for cut in cuts:
                cut.cache_clear()
            yield
        finally:
            for cut in cuts:
                cut.cache_clear()


@contextmanager
def pieces_for(count: int) -> Iterator[None]:
    """However small the arrays are, they go to so many threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "WORTH", 1)
        patch.setattr(threads, "thread_count", lambda: count)
        yield


def refuses(kind: type[Exception], *words: str, call: Callable[[], Any]) -> None:
    """``call`` raises exactly this kind of error, and the message has all these words."""
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)


def refuses_mixed(
    here: Here, op: str, call: Callable[[Array, Array], Any], a: Any, b: Any, dtype: bool = True
) -> None:
    """``call(a, b)`` works, and refuses a ``b`` of another library, device or (with ``dtype``)
    float type, naming both."""
    a = here.array(a, "float32")
    kind = None if np.asarray(b).dtype.kind in "iu" else "float32"
    call(a, here.array(b, kind))
    strict = pytest.importorskip("array_api_strict")
    stranger = resolve("array_api_strict" if here.backend.name == "numpy" else "numpy")
    other = stranger.asarray(np.asarray(b), kind)
    refuses(
        ArrayError, op, "one library", stranger.name, here.backend.name, call=lambda: call(a, other)
    )
    if here.backend.name == "array_api_strict":
        away = here.array(b, kind).to_device(strict.Device("device2"))
        refuses(
            ArrayError,
            op,
            "one device",
            here.backend.place(a.device),
            "device2",
            call=lambda: call(a, away),
        )
    if dtype:
        wide = here.array(b, "float64")
        refuses(ArrayError, op, "one dtype", "float32", "float64", call=lambda: call(a, wide))


def refuses_integers_and_lists(
    here: Here, op: str, call: Callable[[Any], Any], host: np.ndarray
) -> None:
    """The first argument of an op: ``call(float array)`` works, integers and lists are refused."""
    call(here.array(host, "float32"))
    integers = here.array(host, "int32")
    refuses(
        ArrayError, op, "floating point", "int32", here.backend.name, call=lambda: call(integers)
    )
    refuses(ArrayError, "expected an array", "list", call=lambda: call(host.tolist()))
