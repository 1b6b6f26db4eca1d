"""Layers: planning and building, state, modes, and each layer's numbers against PyTorch and finite
differences."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest

from portacnn.errors import (
    ArrayError,
    StateError,
)
from portacnn.layers import (
    AvgPool2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
)
from support.matrix import needs
from support.nets import distinct_batch

# Every layer in several forms, with the shape of one sample. The name and arguments are PyTorch's
# too, but for None.
CASES = [
    (Conv2d, (2, 4, 3), {}, (2, 5, 5)),
    (Conv2d, (None, 3, (3, 2)), {"stride": (2, 1), "padding": (1, 0)}, (2, 5, 4)),
    (Conv2d, (4, 6, 3), {"groups": 2, "dilation": 2, "bias": False}, (4, 6, 5)),
    (Conv2d, (2, 2, 3), {"padding": "same"}, (2, 4, 5)),
    (MaxPool2d, (2,), {}, (2, 5, 4)),
    (MaxPool2d, (3, 2, 1), {}, (2, 5, 6)),
    (MaxPool2d, ((2, 3), (3, 2)), {"ceil_mode": True}, (2, 6, 6)),
    (MaxPool2d, (2, 1), {"dilation": 2}, (1, 5, 4)),
    (AvgPool2d, (2,), {}, (2, 5, 4)),
    (AvgPool2d, (3, 2, 1), {"count_include_pad": False}, (2, 5, 6)),
    (AvgPool2d, ((2, 3), (3, 2)), {"ceil_mode": True}, (2, 6, 6)),
    (Linear, (5, 3), {}, (5,)),
    (Linear, (None, 3), {"bias": False}, (5,)),
    (Flatten, (), {}, (2, 3, 4)),
    (ReLU, (), {}, (2, 3, 4)),
    (Sigmoid, (), {}, (6,)),
]


def each_of(cases: list[tuple]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("kind", "args", "kwargs", "shape"),
        cases,
        ids=[f"{case[0].__name__}{i}" for i, case in enumerate(cases)],
    )


every_layer = each_of(CASES)
every_layer_that_computes = each_of([case for case in CASES if case[0] is not Flatten])


# --- modes and caches -----------------------------------------------------------------------------


@every_layer
def test_backward_needs_a_cache(backend, kind, args, kwargs, shape):
    net = Sequential(mine=kind(*args, **kwargs)).build(shape, device=backend.device, seed=0)
    x = backend.array(distinct_batch((2, *shape)), "float32")
    dy = backend.array(distinct_batch((2, *net.output_shape)), "float32")
    _, nothing = net.children["mine"].forward(x, train=True, keep=False)
    assert nothing is None
    with pytest.raises(StateError, match="expected a cache, got None"):
        net.children["mine"].backward(dy, nothing)
    with pytest.raises(
        StateError,
        match=r"^Sequential: expected a cache, got None; call forward with keep=True$",
    ):
        net.backward(dy, net.forward(x, keep=False)[1])
    for train in (False, True):
        _, cache = net.forward(x, train=train)
        net.backward(dy, cache)
        with pytest.raises(StateError, match="this cache has been used"):
            net.backward(dy, cache)


@every_layer
def test_a_forward_pass_leaves_nothing_on_the_layer(backend, kind, args, kwargs, shape):
    layer = kind(*args, **kwargs).build(shape, device=backend.device, seed=0)
    before = {name: (value, copy.copy(value)) for name, value in vars(layer).items()}
    layer.forward(backend.array(distinct_batch((2, *shape)), "float32"), train=True)
    assert vars(layer).keys() == before.keys()
    for name, (value, content) in before.items():
        assert vars(layer)[name] is value
        if isinstance(value, dict):
            assert all(value[key] is array for key, array in content.items()), name


@pytest.mark.parametrize("dtype", ["uint8", "int64"])
@every_layer_that_computes
def test_layers_refuse_integers(backend, kind, args, kwargs, shape, dtype):
    net = Sequential(mine=kind(*args, **kwargs)).build(shape, device=backend.device, seed=0)
    with pytest.raises(
        ArrayError,
        match=rf"^mine \({kind.__name__}\): x must be floating point, "
        rf"got .*{dtype}",
    ):
        net(backend.array(np.zeros((2, *shape)), dtype))


def test_layers_refuse_another_librarys_arrays():
    pytest.importorskip("array_api_strict")
    net = Sequential(fc=Linear(3, 2)).build((3,), device="array_api_strict:device1", seed=0)
    with pytest.raises(
        ArrayError,
        match=r"^fc \(Linear\): arrays must be of one library; x is "
        r"1x3, numpy.*strict",
    ):
        net(np.zeros((1, 3), "float32"))
    other = Sequential(fc=Linear(3, 2)).build((3,), device="array_api_strict").backend
    with pytest.raises(ArrayError, match="arrays must be on one device"):
        net(other.asarray(np.zeros((1, 3)), "float32"))


# --- numbers --------------------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("n", [1, 3])
@every_layer
def test_values_and_gradients_agree_with_pytorch(backend, kind, args, kwargs, shape, n):
    import torch

    layer = kind(*args, **kwargs).build(shape, device=backend.device, dtype="float64", seed=5)
    twin = getattr(torch.nn, kind.__name__)(
        *(shape[0] if arg is None else arg for arg in args), **kwargs
    ).double()
    twin.load_state_dict(
        {path: torch.tensor(value) for path, value in layer.state_dict().items()}, strict=True
    )
    x = distinct_batch((n, *shape), 1)
    xt = torch.tensor(x, requires_grad=True)
    yt = twin(xt)
    dy = distinct_batch(tuple(yt.shape), 2)
    yt.backward(torch.tensor(dy))

    x_here, dy_here = backend.array(x), backend.array(dy)
    y, cache = layer.forward(x_here, train=True)
    dx = layer.backward(dy_here, cache)
    assert tuple(y.shape) == (n, *layer.output_shape)
    for array in (y, dx):
        assert array.dtype == backend.backend.dtype("float64")
        assert array.device == backend.backend.device
    np.testing.assert_allclose(backend.host(y), yt.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(backend.host(layer(x_here)), backend.host(y), rtol=1e-14)
    np.testing.assert_allclose(backend.host(dx), xt.grad.numpy(), rtol=1e-12, atol=1e-14)
    for name, p in twin.named_parameters():
        np.testing.assert_allclose(
            backend.host(layer.grads[name]), p.grad.numpy(), rtol=1e-12, atol=1e-14
        )
    np.testing.assert_array_equal(backend.host(x_here), x)  # neither input nor gradient was changed
    np.testing.assert_array_equal(backend.host(dy_here), dy)


@every_layer
def test_gradients_agree_with_finite_differences(backend, kind, args, kwargs, shape):
    """Along random directions: (f(a + hv) - f(a - hv)) / 2h = <gradient, v>, for the input and
    every parameter."""
    layer = kind(*args, **kwargs).build(shape, device=backend.device, dtype="float64", seed=5)
    x, rng, h = distinct_batch((2, *shape), 1), np.random.default_rng(0), 1e-6
    dy = distinct_batch((2, *layer.output_shape), 2)
    state = layer.state_dict()

    def f():
        return float(np.sum(backend.host(layer(backend.array(x))) * dy))

    x_here, dy_here = backend.array(x), backend.array(dy)
    _, cache = layer.forward(x_here, train=True)
    gradients = {"x": layer.backward(dy_here, cache), **layer.grads}
    np.testing.assert_array_equal(backend.host(x_here), x)  # neither input nor gradient was changed
    np.testing.assert_array_equal(backend.host(dy_here), dy)
    assert set(gradients) == {"x", *state}
    for name, gradient in gradients.items():
        target = x if name == "x" else state[name]
        v = rng.standard_normal(target.shape)
        values = []
        for step in (h, -h):
            target += step * v
            layer.load_state_dict(state)
            values.append(f())
            target -= step * v
        layer.load_state_dict(state)
        expected = (values[0] - values[1]) / (2 * h)
        assert expected == pytest.approx(
            float(np.sum(backend.host(gradient) * v)), rel=1e-6, abs=1e-8
        ), name


@every_layer
def test_an_empty_batch_is_accepted(backend, kind, args, kwargs, shape):
    layer = kind(*args, **kwargs).build(shape, device=backend.device, seed=5)
    y, cache = layer.forward(backend.array(np.zeros((0, *shape)), "float32"), train=True)
    assert tuple(y.shape) == (0, *layer.output_shape)
    assert y.dtype == backend.backend.dtype("float32")
    dx = layer.backward(backend.array(np.zeros((0, *layer.output_shape)), "float32"), cache)
    assert tuple(dx.shape) == (0, *shape)
    for name, p in layer.params.items():
        assert tuple(layer.grads[name].shape) == tuple(p.shape)
        assert not backend.host(layer.grads[name]).any()


def test_readers_may_write_layers_of_their_own(backend):
    """The worked example of docs/layers.md: a layer with a parameter, in 20 lines; the page's other
    code runs as well."""
    page = (Path(__file__).parents[2] / "docs" / "layers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    example = next(block for block in blocks if "class Scale" in block)
    assert len(example.strip().splitlines()) <= 20
    names: dict = {
        "x": np.ones((2, 3)),
        "dy": np.ones((2, 3)),
        "layer": ReLU(),
        "__name__": "readers",
    }
    for block in blocks:
        exec(block, names)
    assert names["model"].classes == 3
    net = Sequential(Conv2d(1, 2, 1), mine=names["Scale"]()).build(
        (1, 3, 3), device=backend.device, dtype="float64", seed=0
    )
    net.load_state_dict({**net.state_dict(), "mine.factor": np.full((2, 1, 1), 3.0)})
    y, cache = net.forward(backend.array(distinct_batch((4, 1, 3, 3))), train=True)
    net.backward(backend.array(np.ones((4, 2, 3, 3))), cache)
    expected = backend.host(y).sum((0, 2, 3))[:, None, None] / 3.0
    np.testing.assert_allclose(
        backend.host(net.named_gradients()["mine.factor"]), expected, rtol=1e-12
    )
    assert Layer.known.pop("readers.Scale") is names["Scale"]
