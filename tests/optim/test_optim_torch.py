"""Optimizers against PyTorch's, step by step."""

from functools import cache

import numpy as np
import pytest

from portacnn.errors import ArgumentError
from portacnn.flat import Flat, Named
from portacnn.ops import use_kernels
from portacnn.optim import (
    OPTIMIZERS,
    SGD,
    AdaGrad,
    Adam,
    AdamW,
    Momentum,
    RMSprop,
    biases_and_norms,
    make_optimizer,
)
from support.checks import with_each_kernel
from support.matrix import EACH_LIBRARY, backends, needs
from support.optimizers import CASES, SHAPES, WORDS, close, given, gradients, start, writable

STEPS = 50


def betas(arguments):
    """Our arguments as torch's."""
    arguments = dict(arguments)
    if "beta1" in arguments:
        arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
    return arguments


@cache
def torch_walk(case):
    """The parameters after each of torch's steps."""
    import torch

    _, name, arguments = CASES[case]
    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start().items()}
    twin = getattr(torch.optim, name)(theirs.values(), **betas(arguments))
    walk = []
    for step in range(STEPS):
        for path, value in gradients(step).items():
            theirs[path].grad = torch.tensor(value)
        twin.step()
        walk.append({path: value.detach().numpy().copy() for path, value in theirs.items()})
    return walk


@needs("torch")
@pytest.mark.parametrize("case", range(len(CASES)), ids=WORDS)
@with_each_kernel
def test_fifty_steps_agree_with_torch(backend, case):
    kind, _, arguments = CASES[case]
    params, optimizer = writable(backend, start()), kind(**arguments)
    same = dict(params)
    ok = backend.xp.ones((), dtype=backend.xp.bool, device=backend.backend.device)
    for step, expected in enumerate(torch_walk(case)):
        grads = given(backend, gradients(step))
        optimizer.update(params, grads, ok if step % 2 else None)
        close(backend, params, expected)
    close(backend, grads, gradients(STEPS - 1), 0.0)  # not changed
    assert optimizer.steps == STEPS
    assert all(params[path] is same[path] for path in params)


def in_one_array(here, values, flat=None):
    """Arrays as a network's lie where slices are views: all in one; alike with those of
    ``flat``."""
    flat = flat.like() if flat else Flat(here.backend, SHAPES, "float64")
    for path, value in values.items():
        flat.views[path][...] = here.backend.asarray(value)
    return Named.of(flat.views, [flat])


@needs("torch")
@backends(having="views")
@pytest.mark.parametrize("case", range(len(CASES)), ids=WORDS)
@with_each_kernel
def test_fifty_steps_as_in_torch_in_one_array_and_by_numbers_on_the_device(
    backend, case, monkeypatch
):
    """Learning rate and count come as 0-dimensional arrays, as in a step that is replayed; there is
    one update of all."""
    kind, _, arguments = CASES[case]
    params, optimizer = in_one_array(backend, start()), kind(**arguments)
    apply, calls = optimizer.apply, []
    monkeypatch.setattr(
        optimizer,
        "apply",
        lambda p, *rest, **common: calls.append(len(p)) or apply(p, *rest, **common),
    )
    lr = backend.backend.asarray(np.asarray(optimizer.lr))
    optimizer.lr = 7.0
    for step, expected in enumerate(torch_walk(case), start=1):
        grads = in_one_array(backend, gradients(step - 1), params.flats[0])
        optimizer.update(params, grads, lr=lr, count=backend.backend.asarray(np.asarray(step)))
        assert optimizer.steps == step - 1
        optimizer.advance()
        close(backend, params, expected)
    assert calls == [1] * STEPS
    assert set(optimizer.counts.values()) == {STEPS}
    state = optimizer.state_dict()["arrays"]
    assert all(
        state[f"{slot}.{path}"].shape == shape
        for slot in optimizer.slots
        for path, shape in SHAPES.items()
    )


@backends(having="views")
def test_in_one_array_what_decays_and_what_does_not_are_two_updates(backend, monkeypatch):
    arguments = {"weight_decay": 0.3, "no_decay": biases_and_norms}
    params, optimizer, apart = (
        in_one_array(backend, start()),
        AdamW(**arguments),
        AdamW(**arguments),
    )
    separate = writable(backend, start())
    apply, calls = optimizer.apply, []
    monkeypatch.setattr(
        optimizer,
        "apply",
        lambda p, *rest, **common: calls.append(len(p)) or apply(p, *rest, **common),
    )
    for step in range(5):
        grads = in_one_array(backend, gradients(step), params.flats[0])
        optimizer.update(params, grads)
        apart.update(separate, dict(grads))
    close(backend, params, {path: backend.host(value) for path, value in separate.items()}, 1e-15)
    assert calls == [1, 1] * 5


@backends(having="views")
def test_in_one_array_a_parameter_without_a_gradient_stays(backend):
    params, optimizer = in_one_array(backend, start()), Adam()
    grads = in_one_array(backend, gradients(0), params.flats[0])
    optimizer.update(params, grads)
    before = backend.host(params["bn1.weight"])
    optimizer.update(params, {path: grad for path, grad in grads.items() if path != "bn1.weight"})
    assert np.array_equal(backend.host(params["bn1.weight"]), before)
    optimizer.update(params, grads)
    assert optimizer.counts == {path: 2 if path == "bn1.weight" else 3 for path in SHAPES}
    twin = Adam()
    plain = writable(backend, start())
    for kept in (SHAPES, SHAPES.keys() - {"bn1.weight"}, SHAPES):
        twin.update(plain, {path: grads[path] for path in kept})
    close(backend, params, {path: backend.host(value) for path, value in plain.items()}, 1e-15)


@backends(having="views")
def test_a_state_goes_into_one_array_from_a_file_too(backend):
    params, optimizer = in_one_array(backend, start()), Momentum()
    optimizer.update(params, in_one_array(backend, gradients(0), params.flats[0]))
    again = Momentum()
    again.load_state_dict(optimizer.state_dict(), params)
    assert len(again._flat) == 1
    twin = in_one_array(
        backend, {path: backend.host(value) for path, value in params.items()}, params.flats[0]
    )
    grads = in_one_array(backend, gradients(1), params.flats[0])
    optimizer.update(params, grads)
    again.update(twin, grads)
    close(backend, twin, {path: backend.host(value) for path, value in params.items()}, 0.0)


@pytest.mark.parametrize(("kind", "name", "arguments"), CASES, ids=WORDS)
def test_float32_stays_float32_and_near(backend, kind, name, arguments):
    params, wide = writable(backend, start(), "float32"), writable(backend, start())
    narrow_optimizer, wide_optimizer = kind(**arguments), kind(**arguments)
    for step in range(10):
        narrow_optimizer.update(params, given(backend, gradients(step), "float32"))
        wide_optimizer.update(wide, given(backend, gradients(step)))
    assert all(params[path].dtype == backend.xp.float32 for path in params)
    assert all(
        array.dtype == backend.xp.float32
        for slot in narrow_optimizer.state.values()
        for array in slot.values()
    )
    close(backend, params, {path: backend.host(value) for path, value in wide.items()}, 1e-4)


@EACH_LIBRARY
@pytest.mark.parametrize(("kind", "name", "arguments"), CASES, ids=WORDS)
def test_a_step_that_is_not_ok_changes_nothing(backend, kind, name, arguments):
    params, optimizer = writable(backend, start()), kind(**arguments)
    optimizer.update(params, given(backend, gradients(0)))

    def bits():
        state = [array for slot in optimizer.state.values() for array in slot.values()]
        return [backend.host(array).tobytes() for array in (*params.values(), *state)]

    before = bits()
    no = backend.xp.zeros((), dtype=backend.xp.bool, device=backend.backend.device)
    poison = {path: np.full(shape, np.nan) for path, shape in SHAPES.items()}
    for kernels in ("auto", "reference"):
        with use_kernels(kernels):
            optimizer.update(params, given(backend, poison), no)
        assert bits() == before


@needs("torch")
def test_parameters_that_come_later_count_for_themselves(backend):
    """As in torch: dampening and Adam's correction of the means go by each parameter's own
    steps."""
    import torch

    for kind, name, arguments in (CASES[3], CASES[13]):
        theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start().items()}
        twin = getattr(torch.optim, name)(theirs.values(), **betas(arguments))
        params, optimizer = writable(backend, start()), kind(**arguments)
        for step in range(12):
            here = {
                path: g
                for path, g in gradients(step).items()
                if step >= 4 or path.startswith("conv1")
            }
            here.pop("bn1.weight" if step % 3 else "conv1.bias", None)
            optimizer.update(params, given(backend, here))
            for path, parameter in theirs.items():
                parameter.grad = torch.tensor(here[path]) if path in here else None
            twin.step()
            close(backend, params, {path: value.detach().numpy() for path, value in theirs.items()})
        assert optimizer.counts == {
            "conv1.weight": 12,
            "conv1.bias": 8,
            "bn1.weight": 2,
            "fc1.weight": 8,
            "scale": 8,
        }


def test_the_rate_of_one_step(backend):
    """``lr=`` comes before ``self.lr``, and leaves it alone."""
    for kind, _, arguments in CASES:
        one, other = writable(backend, start()), writable(backend, start())
        first, second = kind(**{**arguments, "lr": 0.5}), kind(**{**arguments, "lr": 0.125})
        first.update(one, given(backend, gradients(0)), lr=0.125)
        second.update(other, given(backend, gradients(0)))
        assert first.lr == 0.5
        close(backend, one, {path: backend.host(value) for path, value in other.items()}, 0.0)


@needs("torch")
@pytest.mark.parametrize(
    ("no_decay", "spared"),
    [
        (biases_and_norms, {"conv1.bias", "bn1.weight", "scale"}),
        (("bias", "bn*"), {"conv1.bias", "bn1.weight"}),
        ("conv1.*", {"conv1.weight", "conv1.bias"}),
        (["fc?.weight", "scale"], {"fc1.weight", "scale"}),
        (lambda path, array: array.shape == (3,), {"conv1.bias", "bn1.weight"}),
        ((), set()),
    ],
)
@pytest.mark.parametrize(
    ("kind", "name"), [(SGD, "SGD"), (AdamW, "AdamW"), (RMSprop, "RMSprop"), (AdaGrad, "Adagrad")]
)
def test_decay_by_parameter(backend, kind, name, no_decay, spared):
    import torch

    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in start().items()}
    groups = [
        {"params": [p for path, p in theirs.items() if path not in spared], "weight_decay": 0.2},
        {"params": [p for path, p in theirs.items() if path in spared], "weight_decay": 0.0},
    ]
    twin = getattr(torch.optim, name)([group for group in groups if group["params"]], lr=0.1)
    params, optimizer = (
        writable(backend, start()),
        kind(lr=0.1, weight_decay=0.2, no_decay=no_decay),
    )
    for step in range(5):
        optimizer.update(params, given(backend, gradients(step)))
        for path, value in gradients(step).items():
            theirs[path].grad = torch.tensor(value)
        twin.step()
    close(backend, params, {path: value.detach().numpy() for path, value in theirs.items()})


def test_a_name_that_selects_nothing_is_told(backend):
    params = writable(backend, start())
    optimizer = SGD(0.1, weight_decay=0.1, no_decay=("bias", "biass"))
    with pytest.raises(
        ArgumentError,
        match=r"'biass' matches none of the parameters "
        r"conv1\.weight",
    ) as caught:
        optimizer.update(params, given(backend, gradients(0)))
    assert "scale" in str(caught.value)
    assert optimizer.steps == 0
    close(backend, params, start(), 0.0)
    with pytest.raises(ArgumentError, match="by name patterns, got"):
        SGD(0.1, no_decay=3)
    with pytest.raises(ArgumentError, match="by name patterns, got"):
        SGD(0.1, no_decay=("bias", 3))


def test_centered_rmsprop_of_constant_gradients_stays_finite(backend):
    """The variance tends to 0, and rounding takes it below, where its root would be NaN."""
    for kernels in ("auto", "reference"):
        params = {"w": backend.backend.asarray(np.zeros(50), "float32")}
        grads = {"w": backend.array(np.linspace(0.1, 3.0, 50), "float32")}
        optimizer = RMSprop(0.001, alpha=0.5, centered=True)
        with use_kernels(kernels):
            for _ in range(60):
                optimizer.update(params, grads)
        assert np.isfinite(backend.host(params["w"])).all()


# --- names and numbers ----------------------------------------------------------------------------


def test_names():
    assert {name: type(make_optimizer(name)) for name in OPTIMIZERS} == {
        "sgd": SGD,
        "momentum": Momentum,
        "adagrad": AdaGrad,
        "rmsprop": RMSprop,
        "adam": Adam,
        "adamw": AdamW,
    }
    made = make_optimizer("AdamW", {"lr": 0.1, "weight_decay": 0.5, "no_decay": ("bias",)})
    assert (type(made), made.lr, made.weight_decay, made.no_decay) == (AdamW, 0.1, 0.5, ("bias",))
    assert Momentum().momentum == 0.9
    assert SGD().slots == ()
    assert Momentum().slots == ("velocity",)


@pytest.mark.parametrize(
    ("kind", "arguments", "word"),
    [
        (SGD, {"lr": -1}, "lr"),
        (SGD, {"lr": "1"}, "lr"),
        (SGD, {"lr": True}, "lr"),
        (SGD, {"momentum": 1.0}, "momentum"),
        (SGD, {"dampening": -0.1}, "dampening"),
        (SGD, {"nesterov": True}, "nesterov needs momentum"),
        (SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov needs momentum"),
        (SGD, {"weight_decay": -1e-4}, "weight_decay"),
        (SGD, {"weight_decay": float("inf")}, "weight_decay"),
        (AdaGrad, {"lr_decay": -1}, "lr_decay"),
        (AdaGrad, {"initial_accumulator_value": -1}, "initial_accumulator_value"),
        (RMSprop, {"alpha": 1.0}, "alpha"),
        (RMSprop, {"momentum": -0.5}, "momentum"),
        (RMSprop, {"eps": float("nan")}, "eps"),
        (Adam, {"beta2": 1.0}, "beta2"),
        (AdamW, {"weight_decay": None}, "weight_decay"),
    ],
)
def test_invalid_options_are_refused(kind, arguments, word):
    with pytest.raises(ArgumentError, match=word):
        kind(**arguments)
    with pytest.raises(ArgumentError, match=word):
        make_optimizer(next(name for name, known in OPTIMIZERS.items() if known is kind), arguments)
