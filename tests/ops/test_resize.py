"""Interpolation and pixel shuffle: PyTorch on drawn sizes, numerical gradients, every layout."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from portacnn import ops
from portacnn.errors import ArgumentError, ShapeError
from support.checks import (
    DTYPES,
    LAYOUTS,
    agree,
    gradient_agrees,
    laid_out,
    normal,
    refuses,
    refuses_integers_and_lists,
    untouched,
)
from support.matrix import Here, needs

LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


@st.composite
def drawn(draw: st.DrawFn) -> tuple[tuple[int, ...], dict[str, Any]]:
    axes = draw(st.integers(1, 3))
    each = lambda values: st.tuples(*[values] * axes)  # noqa: E731
    size = draw(each(st.integers(1, 6)))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["size"] = draw(each(st.integers(1, 13)))
    else:
        options["scale_factor"] = draw(
            each(st.sampled_from([0.5, 0.7, 1.0, 1.1, 1.5, 1.7, 2.0, 3.0]))
        )
        size = tuple(n + 1 for n in size)
    if draw(st.booleans()):
        options |= {"mode": LINEAR[axes], "align_corners": draw(st.booleans())}
    return (2, 3, *size), options


@settings(max_examples=40)
@given(
    case=drawn(), dtype=st.sampled_from(DTYPES), layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2)
)
@needs("torch")
def test_interpolation_agrees_with_pytorch(backend: Here, case: tuple, dtype: str, layouts: tuple):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    shape, options = case
    host = normal(*shape)
    leaf = torch.tensor(host, requires_grad=True)
    theirs = options if "mode" in options else {**options, "mode": "nearest"}
    expected = torch.nn.functional.interpolate(leaf, **theirs)
    # PyTorch's backward of "nearest" takes equal sizes for an identity, which its forward does not.
    kept = [n for n, m in zip(shape, expected.shape, strict=True) if n == m][2:]
    assume("scale_factor" not in options or "mode" in options or not kept)
    dy = normal(*expected.shape, seed=1)
    expected.backward(torch.tensor(dy))
    x, up = (laid_out(backend, h, dtype, how) for h, how in zip((host, dy), layouts, strict=True))
    with untouched(backend, x, up):
        y, cache = ops.interpolate(x, **options)
        dx = ops.interpolate_backward(up, cache)
    agree(backend, y, expected.detach().numpy(), x)
    agree(backend, dx, leaf.grad.numpy(), x)
    assert ops.interpolate(x, **options, keep=False)[1] is None


@needs("torch")
def test_sizes_at_which_rounding_could_matter():
    """Every size to every other, up to where a product in float32 is no longer exact."""
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    for n in (1, 2, 3, 7, 10, 41, 49, 98, 107):
        x = np.arange(float(n))[None, None]
        for m in range(1, 150):
            expected = torch.nn.functional.interpolate(torch.tensor(x), m)
            np.testing.assert_array_equal(ops.interpolate(x, m)[0], expected.numpy())


@pytest.mark.parametrize(
    "options",
    [
        {"size": (5, 2)},
        {"scale_factor": (2, 0.5), "mode": "bilinear"},
        {"size": (5, 1), "mode": "bilinear", "align_corners": True},
    ],
)
def test_gradients_agree_with_finite_differences(backend: Here, options: dict):
    host = normal(2, 2, 3, 4)
    y, cache = ops.interpolate(backend.array(host), **options)
    dy = backend.array(normal(*y.shape, seed=1))

    def loss(x: Any) -> Any:
        return backend.xp.sum(ops.interpolate(x, **options, keep=False)[0] * dy)

    gradient_agrees(backend, ops.interpolate_backward(dy, cache), loss, host)


def test_a_doubling_takes_few_slices():
    """However large the image is."""
    from portacnn.ops.resize import axes_of, runs_of

    assert len(runs_of(*axes_of((512,), 1024, None, "nearest"))) == 2
    assert len(runs_of(*axes_of((512,), 1024, None, "linear"))) == 4  # and the edges


@settings(max_examples=15)
@given(
    r=st.integers(1, 3), size=st.tuples(*[st.integers(1, 3)] * 4), layout=st.sampled_from(LAYOUTS)
)
@needs("torch")
def test_pixel_shuffle_agrees_with_pytorch(backend: Here, r: int, size: tuple, layout: str):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    n, c, h, w = size
    small, large = normal(n, c * r * r, h, w), normal(n, c, h * r, w * r)
    for name, host, other in (("pixel_shuffle", small, large), ("pixel_unshuffle", large, small)):
        leaf = torch.tensor(host, requires_grad=True)
        expected = getattr(torch.nn.functional, name)(leaf, r)
        expected.backward(torch.tensor(other))
        x = laid_out(backend, host, "float64", layout)
        y, cache = getattr(ops, name)(x, r)
        dx = getattr(ops, f"{name}_backward")(laid_out(backend, other, "float64", layout), cache)
        agree(backend, y, expected.detach().numpy(), x)
        agree(backend, dx, leaf.grad.numpy(), x)


X = normal(1, 4, 3, 3)


@pytest.mark.parametrize(
    ("kind", "words", "x", "options"),
    [
        (
            ArgumentError,
            ("mode", '"nearest", "linear"', "'cubic'"),
            X,
            {"size": 2, "mode": "cubic"},
        ),
        (ArgumentError, ("either size or scale_factor",), X, {}),
        (ArgumentError, ("either size or scale_factor",), X, {"size": 2, "scale_factor": 2}),
        (ArgumentError, ("align_corners", "nearest"), X, {"size": 2, "align_corners": True}),
        (ArgumentError, ("size", "at least 1"), X, {"size": (2, 0)}),
        (ArgumentError, ("scale_factor", "above 0", "-1"), X, {"scale_factor": -1}),
        (ArgumentError, ("scale_factor", "2 of them"), X, {"scale_factor": (1, 2, 3)}),
        (ArgumentError, ("scale_factor",), X, {"scale_factor": "two"}),
        (ShapeError, ("makes (0, 0) cells", "at least 1"), X, {"scale_factor": 0.1}),
        (ShapeError, ('"linear" is for inputs (N, C, length)',), X, {"size": 2, "mode": "linear"}),
        (ShapeError, ("at least one cell",), X[:, :, :0], {"size": 2}),
        (ShapeError, ("*S", "got 2 axes"), X[0, 0], {"size": 2}),
    ],
)
def test_wrong_arguments_are_refused(backend: Here, kind, words, x, options):
    refuses(
        kind, "interpolate: ", *words, call=lambda: ops.interpolate(backend.array(x), **options)
    )


def test_errors_of_pixel_shuffle(backend: Here):
    x = backend.array(X)
    refuses(ShapeError, "pixel_shuffle: ", "C*9", call=lambda: ops.pixel_shuffle(x, 3))
    refuses(ShapeError, "pixel_unshuffle: ", "of 2", call=lambda: ops.pixel_unshuffle(x, 2))
    refuses(ArgumentError, "upscale_factor", call=lambda: ops.pixel_shuffle(x, 0))
    refuses(ShapeError, "(N, C, H, W)", call=lambda: ops.pixel_shuffle(x[0, ...], 2))
    refuses_integers_and_lists(backend, "pixel_shuffle: ", lambda x: ops.pixel_shuffle(x, 2), X)
    refuses_integers_and_lists(backend, "interpolate: ", lambda x: ops.interpolate(x, 2), X)
