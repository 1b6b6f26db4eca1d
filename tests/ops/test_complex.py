"""Complex arrays: the linear ops take them, with gradients in PyTorch's convention; every other op,
layer and model refuses them."""

from typing import Any

import numpy as np
import pytest

import portacnn
from portacnn import ops
from portacnn.errors import ArgumentError, ArrayError
from portacnn.layers import Conv2d
from portacnn.ops.dispatch import OPS
from portacnn.runtime import resolve
from portacnn.testing.examples import EXAMPLES, Random, as_given, call, mapped
from support import oracles
from support.checks import agree, choices, face, refuses, untouched, with_each_kernel
from support.matrix import EACH_LIBRARY, Here, backends, needs

LINEAR = {
    *(f"{kind}{n}d" for kind in ("conv", "conv_transpose", "avg_pool") for n in (1, 2, 3)),
    *(f"adaptive_avg_pool{n}d" for n in (1, 2, 3)),
    *("global_avg_pool", "linear", "pad", "im2col", "col2im", "unfold", "fold"),
}
"""The public ops that take complex arrays."""
INNER = {"conv", "conv_transpose", "avg_pool", "adaptive_avg_pool", "pad_axes", "gather", "scatter"}
WHOLE = {"complex64": "float32", "complex128": "float64"}

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"axes": 2},
    "one axis, groups": {"axes": 1, "groups": 2, "stride": (2,), "padding": ((2, 1),)},
    "two axes, everything": {
        **{"axes": 2, "groups": 2, "stride": (2, 1), "dilation": (1, 2)},
        "padding": ((1, 0), (2, 3)),
    },
    "each channel apart": {"axes": 2, "groups": 4, "padding": ((1, 1), (1, 1))},
    "one by one": {"axes": 2, "kernel": (1, 1)},
    "three axes": {"axes": 3, "stride": (1, 2, 1), "padding": ((1, 1), (0, 0), (1, 0))},
}


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def close(here: Here, got: Any, expected: np.ndarray, dtype: str) -> None:
    like = here.array(np.zeros(1), dtype)
    agree(here, got, expected, like, 2e-5 if dtype == "complex64" else 1e-11)


def geometry(axes: int, **given: Any) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    """(S, K, options)"""
    size = {1: (9,), 2: (5, 6), 3: (4, 4, 3)}[axes]
    kernel = given.pop("kernel", {1: (3,), 2: (3, 2), 3: (2, 3, 2)}[axes])
    ones = (1,) * axes
    options = {"stride": ones, "dilation": ones, "groups": 1, "padding": ((0, 0),) * axes}
    return size, kernel, {**options, **given}


def as_oracle(options: dict[str, Any]) -> dict[str, Any]:
    return {("pads" if word == "padding" else word): value for word, value in options.items()}


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("name", GEOMETRIES)
@with_each_kernel
def test_convolution(backend: Here, name: str, dtype: str):
    axes = GEOMETRIES[name]["axes"]
    size, kernel, options = geometry(**GEOMETRIES[name])
    x, weight = numbers(3, 4, *size), numbers(6 if options["groups"] < 4 else 8, 4, *kernel, seed=1)
    weight = weight[:, : 4 // options["groups"]]
    bias = numbers(len(weight), seed=2)
    expected = oracles.conv(x, weight, bias, **as_oracle(options))
    dy = numbers(*expected.shape, seed=3)
    gradients = oracles.conv_gradients(x, weight, dy, **as_oracle(options))

    given = [backend.array(host, dtype) for host in (x, weight, bias, dy)]
    forward, backward = face("conv", axes)
    with untouched(backend, *given):
        y, cache = forward(*given[:3], **options)
        close(backend, y, expected, dtype)
        for got, right in zip(backward(given[3], cache), gradients, strict=True):
            close(backend, got, right, dtype)
    some = backward(given[3], cache, need_dx=False, need_dbias=False)
    assert [one is None for one in some] == [True, False, True]
    y, cache = forward(given[0], given[1], **options, keep=False)
    close(backend, y, expected - bias.reshape(-1, *(1,) * axes), dtype)
    assert cache is None


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("name", GEOMETRIES)
@with_each_kernel
def test_transposed_convolution(backend: Here, name: str, dtype: str):
    axes = GEOMETRIES[name]["axes"]
    size, kernel, options = geometry(**GEOMETRIES[name])
    x, weight, bias = numbers(3, 4, *size), numbers(4, 3, *kernel, seed=1), numbers(3, seed=2)
    bias = numbers(3 * options["groups"], seed=2)
    expected = oracles.conv_transpose(
        x, weight, bias, output_padding=(0,) * axes, **as_oracle(options)
    )
    dy = numbers(*expected.shape, seed=3)
    conjugate = weight.conj()
    dx = oracles.conv(dy, conjugate, None, **as_oracle(options))
    _, dweight, _ = oracles.conv_gradients(dy, weight, x, **as_oracle(options))

    given = [backend.array(host, dtype) for host in (x, weight, bias, dy)]
    forward, backward = face("conv_transpose", axes)
    with untouched(backend, *given):
        y, cache = forward(*given[:3], **options)
        close(backend, y, expected, dtype)
        found = backward(given[3], cache)
    right = dx, dweight.conj(), dy.sum(axis=(0, *range(2, dy.ndim)))
    for got, one in zip(found, right, strict=True):
        close(backend, got, one, dtype)


@pytest.mark.parametrize("dtype", WHOLE)
@with_each_kernel
def test_affine_map(backend: Here, dtype: str):
    x, weight, bias, dy = numbers(5, 4), numbers(3, 4, seed=1), numbers(3), numbers(5, 3, seed=2)
    given = [backend.array(host, dtype) for host in (x, weight, bias, dy)]
    with untouched(backend, *given):
        y, cache = ops.linear(*given[:3])
        found = ops.linear_backward(given[3], cache)
    close(backend, y, np.einsum("nf,of->no", x, weight) + bias, dtype)
    dx, dweight = (
        np.einsum("no,of->nf", dy, weight.conj()),
        np.einsum("no,nf->of", dy, x.conj()),
    )
    for got, right in zip(found, (dx, dweight, dy.sum(0)), strict=True):
        close(backend, got, right, dtype)


@pytest.mark.parametrize("dtype", WHOLE)
@pytest.mark.parametrize("padding", [0, 1])
@with_each_kernel
def test_average_pooling(backend: Here, padding: int, dtype: str):
    x = numbers(2, 3, 5, 6)
    out, pads = ((2, 2), (3, 3))[padding], ((padding, padding),) * 2
    arguments = (out, (3, 3), (2, 2), pads, False, None)
    expected, shares = oracles.avg_pool(x, *arguments)
    y, cache = ops.avg_pool2d(
        backend.array(x, dtype), 3, stride=2, padding=padding, count_include_pad=False
    )
    close(backend, y, expected, dtype)
    dy = numbers(*expected.shape, seed=1)
    dx = ops.avg_pool2d_backward(backend.array(dy, dtype), cache)
    close(backend, dx, oracles.shared(x.shape, shares, dy), dtype)


def complex_of(host: np.ndarray) -> np.ndarray:
    return host + 1j * np.random.default_rng(host.size).standard_normal(host.shape)


@pytest.mark.parametrize("name", sorted(LINEAR - {"im2col", "col2im", "unfold", "fold"}))
def test_the_gradient_is_the_adjoint(backend: Here, name: str):
    """<A x, y> = <x, A^H y>, on every backend with each of its kernel sets."""
    example = next(e for e in EXAMPLES.values() if e.op == name)
    given = as_given(example.draw(Random(3, "small")), complex_of)
    given = {word: value for word, value in given.items() if word != "bias"}
    for choice in choices(backend):
        with ops.use_kernels(choice):
            out, cache = call(example.forward, {**mapped(given, backend.array), "keep": True})
            y = numbers(*out.shape, seed=5)
            found = example.backward(backend.array(y), cache)
        adjoint = backend.host(found[0] if isinstance(found, tuple) else found)
        left, right = np.vdot(y, backend.host(out)), np.vdot(adjoint, given["x"])
        assert abs(left - right) <= 1e-12 * max(1.0, abs(left), np.abs(y).sum()), choice


def test_columns(backend: Here):
    """im2col and col2im, unfold and fold, of both parts at once."""
    x = numbers(2, 3, 6, 5)
    given = backend.array(x)
    rows = backend.host(ops.im2col(given, 3, 2, 2, 1))
    parts = [ops.im2col(np.ascontiguousarray(part), 3, 2, 2, 1) for part in (x.real, x.imag)]
    np.testing.assert_array_equal(rows, parts[0] + 1j * parts[1])
    back = backend.host(ops.col2im(backend.array(rows), x.shape, 3, 2, 2, 1))
    both = [
        ops.col2im(np.ascontiguousarray(part), x.shape, 3, 2, 2, 1)
        for part in (rows.real, rows.imag)
    ]
    np.testing.assert_allclose(back, both[0] + 1j * both[1], rtol=1e-14)
    for axes in (1, 2, 3):
        size, kernel, options = geometry(axes, padding=((1, 0),) * axes)
        del options["groups"]
        x = numbers(2, 3, *size)
        columns = ops.unfold(backend.array(x), kernel, **options)
        y = numbers(*columns.shape, seed=1)
        folded = ops.fold(backend.array(y), size, kernel, **options)
        assert abs(np.vdot(y, backend.host(columns)) - np.vdot(backend.host(folded), x)) < 1e-10
        weight = numbers(4, 3, *kernel, seed=2)
        product = np.einsum("om,nml->nol", weight.reshape(4, -1), backend.host(columns))
        expected = oracles.conv(x, weight, None, groups=1, **as_oracle(options))
        np.testing.assert_allclose(product.reshape(expected.shape), expected, rtol=1e-10)


@needs("torch")
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kind", ["conv", "conv_transpose"])
@with_each_kernel
def test_gradients_are_those_of_pytorch(backend: Here, kind: str, axes: int):
    import torch

    forward, backward = face(kind, axes)
    shapes = (2, 4, *(6, 5, 4)[:axes]), (4, 2, *(3, 2, 2)[:axes]), (4,)
    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 2, "groups": 2}
    if kind == "conv_transpose":
        options["output_padding"] = 1
    hosts = [numbers(*shape, seed=i) for i, shape in enumerate(shapes)]
    leaves = [torch.tensor(host, requires_grad=True) for host in hosts]
    expected = getattr(torch.nn.functional, f"{kind}{axes}d")(*leaves, **options)
    dy = numbers(*expected.shape, seed=9)
    expected.backward(torch.tensor(dy))
    y, cache = forward(*(backend.array(host) for host in hosts), **options)
    close(backend, y, expected.detach().numpy(), "complex128")
    for got, leaf in zip(backward(backend.array(dy), cache), leaves, strict=True):
        close(backend, got, leaf.grad.numpy(), "complex128")


@needs("torch")
def test_unfold_and_fold_are_those_of_pytorch():
    import torch.nn.functional as F

    x = np.random.default_rng(0).standard_normal((2, 3, 7, 6))
    options: dict[str, Any] = {"stride": (2, 1), "padding": 1, "dilation": (1, 2)}
    columns = ops.unfold(x, (3, 2), **options)
    given = resolve("torch").asarray(x)
    np.testing.assert_array_equal(columns, F.unfold(given, (3, 2), **options))
    there = F.fold(F.unfold(given, (3, 2), **options), (7, 6), (3, 2), **options)
    np.testing.assert_allclose(ops.fold(columns, (7, 6), (3, 2), **options), there, rtol=1e-12)


@backends("numpy", "torch", "cupy-emulated")
def test_infinity_stays_in_its_part(backend: Here):
    """As in any sum of products of parts: a part of NaN would come from a product with i."""
    x = np.ones((1, 1, 2, 2), np.complex64)
    x[0, 0, 0, 0] = complex(1, np.inf)
    y, cache = ops.avg_pool2d(backend.array(x), 2)
    assert backend.host(y).item() == complex(1, np.inf)
    dx = backend.host(ops.avg_pool2d_backward(y, cache))
    np.testing.assert_array_equal(dx, np.full((1, 1, 2, 2), complex(0.25, np.inf), np.complex64))
    weight = backend.array(np.full((1, 1, 1, 1), 1 + 1j, np.complex64))
    y = backend.host(ops.conv2d(backend.array(x), weight)[0])
    assert y[0, 0, 0, 0].real == -np.inf
    assert y[0, 0, 0, 0].imag == np.inf


def test_memory_of_any_kind():
    """Foreign byte order, slices, conjugates that torch has not computed yet, and no samples."""
    x, weight = numbers(4, 2, 5, 6), numbers(3, 2, 2, 2, seed=1)
    expected = ops.conv2d(x, weight)[0]
    stepped = np.zeros((8, 2, 5, 12), complex)[::2, :, :, ::-2]
    stepped[...] = x
    np.testing.assert_allclose(ops.conv2d(stepped, weight)[0], expected)
    swapped = ops.conv2d(x.astype(">c16"), weight.astype(">c16"))[0]
    assert swapped.dtype.isnative
    np.testing.assert_allclose(swapped, expected)
    y, cache = ops.conv2d(x[:0], weight)
    assert y.shape == (0, *expected.shape[1:])
    dx, dweight, _ = ops.conv2d_backward(y, cache)
    assert dx.shape == (0, 2, 5, 6)
    assert not dweight.any()


@needs("torch")
def test_conjugates_of_torch():
    import torch

    x, weight = torch.tensor(numbers(2, 2, 5, 6)), torch.tensor(numbers(3, 2, 2, 2, seed=1))
    got = ops.conv2d(x.conj(), weight.conj())[0]
    torch.testing.assert_close(got, ops.conv2d(x, weight)[0].conj().resolve_conj())


@EACH_LIBRARY
def test_ops_of_real_numbers_refuse_complex_ones(backend: Here):
    for example in EXAMPLES.values():
        if example.op not in LINEAR | INNER:
            given = as_given(example.draw(Random(1, "small")), complex_of)
            placed = mapped(given, backend.array)
            refuses(
                ArrayError,
                *("must be real", "complex128"),
                call=lambda: call(example.forward, placed),  # noqa: B023
            )


def test_the_ops_that_say_so_are_these():
    assert {name for name, op in OPS.items() if op.complex_pair} == INNER | {"linear"}
    x = np.ones((1, 1, 3, 3), np.complex64)
    refuses(ArrayError, "relu", "real", "complex64", "xp.real", call=lambda: ops.relu(x))
    refuses(
        ArrayError,
        *("conv2d", "one dtype", "complex64", "float32", "layers are real"),
        call=lambda: ops.conv2d(x, np.ones((1, 1, 2, 2), np.float32)),
    )
    y, cache = ops.conv2d(x, x)
    refuses(
        ArrayError,
        *("conv_backward", "gradient", "complex64"),
        call=lambda: ops.conv2d_backward(y.real, cache),
    )


def test_layers_and_models_refuse_complex_images():
    images = np.ones((1, 1, 28, 28), np.complex64)
    model = portacnn.SimpleConvNet(seed=0)
    for call_ in (model, model.predict):
        refuses(ArrayError, "real", "complex64", call=lambda: call_(images))  # noqa: B023
    layer = Conv2d(1, 2, 3)
    layer.build((1, 28, 28), device="cpu", seed=0)
    refuses(ArrayError, "layers are real", "complex64", call=lambda: layer(images))
    refuses(
        ArgumentError,
        *("complex64", "real"),
        call=lambda: Conv2d(1, 2, 3).build((1, 28, 28), dtype="complex64"),
    )
