"""Optimizers and clipping against torch.optim, step by step, on every backend; decay by parameter;
state to and from files."""

import json
from functools import cache

import numpy as np
import pytest

from portacnn import ops
from portacnn.errors import ArgumentError, ArrayError, ModelFormatError
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

STEPS = 50
SHAPES = {
    "conv1.weight": (3, 2, 2, 2),
    "conv1.bias": (3,),
    "bn1.weight": (3,),
    "fc1.weight": (4, 5),
    "scale": (),
}


def betas(arguments):
    """Our arguments as torch's."""
    arguments = dict(arguments)
    if "beta1" in arguments:
        arguments["betas"] = (arguments.pop("beta1"), arguments.pop("beta2"))
    return arguments


CASES = [
    (SGD, "SGD", {"lr": 0.1}),
    (SGD, "SGD", {"lr": 0.1, "weight_decay": 0.02}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.9}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01}),
    (SGD, "SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (Momentum, "SGD", {"lr": 0.05, "momentum": 0.9}),
    (AdaGrad, "Adagrad", {}),
    (
        AdaGrad,
        "Adagrad",
        {
            "lr": 0.3,
            "lr_decay": 0.1,
            "weight_decay": 0.1,
            "initial_accumulator_value": 0.5,
            "eps": 1e-3,
        },
    ),
    (RMSprop, "RMSprop", {}),
    (RMSprop, "RMSprop", {"alpha": 0.9, "eps": 1e-4, "weight_decay": 0.1, "momentum": 0.7}),
    (RMSprop, "RMSprop", {"alpha": 0.8, "eps": 1e-4, "centered": True}),
    (
        RMSprop,
        "RMSprop",
        {"alpha": 0.8, "eps": 1e-2, "centered": True, "momentum": 0.5, "weight_decay": 0.01},
    ),
    (Adam, "Adam", {}),
    (Adam, "Adam", {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-4, "weight_decay": 0.1}),
    (Adam, "Adam", {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (AdamW, "AdamW", {}),
    (AdamW, "AdamW", {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.2}),
]
WORDS = [f"{kind.__name__}-{'-'.join(arguments) or 'defaults'}" for kind, _, arguments in CASES]


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {path: np.asarray(rng.standard_normal(shape)) for path, shape in SHAPES.items()}


def gradients(step):
    rng = np.random.default_rng(1000 + step)
    return {path: np.asarray(0.3 + rng.standard_normal(shape)) for path, shape in SHAPES.items()}


def writable(here, values, dtype="float64"):
    return {path: here.backend.asarray(value, dtype) for path, value in values.items()}


def given(here, values, dtype="float64"):
    return {path: here.array(value, dtype) for path, value in values.items()}


def close(here, params, expected, tolerance=1e-12):
    for path, value in expected.items():
        np.testing.assert_allclose(
            here.host(params[path]), value, rtol=tolerance, atol=tolerance, err_msg=path
        )


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
def test_fifty_steps_as_in_torch(backend, case):
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


# --- state ----------------------------------------------------------------------------------------


@EACH_LIBRARY
@pytest.mark.parametrize(("kind", "name", "arguments"), CASES, ids=WORDS)
def test_state_goes_to_a_file_and_back(backend, tmp_path, kind, name, arguments):
    from portacnn.files import load_tensors, save_tensors

    def steps(optimizer, params, numbers):
        for step in numbers:
            optimizer.update(params, given(backend, gradients(step)))

    whole, straight = writable(backend, start()), kind(**arguments)
    steps(straight, whole, range(8))
    params, first = writable(backend, start()), kind(**arguments)
    steps(first, params, range(4))
    first.lr = straight.lr * 2
    state = first.state_dict()
    steps(first, writable(backend, start(1)), range(3))  # the state is a copy
    save_tensors(
        tmp_path / "state", state["arrays"], {key: state[key] for key in state if key != "arrays"}
    )
    arrays, header = load_tensors(tmp_path / "state")
    assert json.loads(json.dumps(header)) == header
    again = kind(**arguments)
    again.load_state_dict({**header, "arrays": arrays}, params)
    assert (again.lr, again.steps, again.counts) == (2 * straight.lr, 4, dict.fromkeys(SHAPES, 4))
    again.lr = straight.lr
    steps(again, params, range(4, 8))
    close(backend, params, {path: backend.host(value) for path, value in whole.items()}, 0.0)
    assert again.steps == 8


def test_state_is_written_into_the_arrays_that_are_there(backend):
    params, optimizer = writable(backend, start()), Momentum(0.1)
    optimizer.update(params, given(backend, gradients(0)))
    arrays, state = dict(optimizer.state["velocity"]), optimizer.state_dict()
    optimizer.update(params, given(backend, gradients(1)))
    optimizer.load_state_dict(state, params)
    assert all(optimizer.state["velocity"][path] is arrays[path] for path in arrays)
    close(backend, optimizer.state["velocity"], gradients(0), 0.0)
    assert optimizer.steps == 1
    for host in state["arrays"].values():
        assert isinstance(host, np.ndarray)


def test_state_takes_the_dtype_of_the_parameters(backend):
    optimizer = Adam()
    optimizer.update(writable(backend, start()), given(backend, gradients(0)))
    narrow, params = Adam(), writable(backend, start(), "float32")
    narrow.load_state_dict(optimizer.state_dict(), params)
    assert narrow.state["mean"]["scale"].dtype == backend.xp.float32
    narrow.update(params, given(backend, gradients(1), "float32"))


def test_state_that_does_not_fit(backend):
    params, optimizer = writable(backend, start()), Momentum(0.1)
    optimizer.update(params, given(backend, gradients(0)))
    good = optimizer.state_dict()
    arrays = good["arrays"]
    fewer = {path: params[path] for path in params if path != "scale"}
    bad = [
        ({**good, "optimizer": "Adam"}, params, "expected the state of Momentum, got that of Adam"),
        ({key: good[key] for key in good if key != "counts"}, params, "counts missing"),
        (
            {**good, "arrays": {**arrays, "mean.scale": np.zeros(())}},
            params,
            "unexpected: mean.scale",
        ),
        (
            {**good, "arrays": {k: v for k, v in arrays.items() if "fc1" not in k}},
            params,
            "missing: velocity.fc1.weight",
        ),
        (
            {**good, "arrays": {**arrays, "velocity.scale": np.zeros(2)}},
            params,
            r"velocity.scale \(2,\) \(expected \(\)\)",
        ),
        (good, fewer, "unknown parameters: scale"),
        ({**good, "steps": -1}, params, "steps must be"),
        ({**good, "lr": "0.1"}, params, "lr must be"),
        ({**good, "counts": {**good["counts"], "scale": 0}}, params, "the count of scale"),
    ]
    before = optimizer.state_dict()
    for state, these, message in bad:
        with pytest.raises(ModelFormatError, match=message):
            optimizer.load_state_dict(state, these)
    after = optimizer.state_dict()
    assert {k: after[k] for k in after if k != "arrays"} == {
        k: before[k] for k in before if k != "arrays"
    }
    assert all((after["arrays"][name] == before["arrays"][name]).all() for name in before["arrays"])


# --- clipping -------------------------------------------------------------------------------------


@needs("torch")
@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 7.0, 1e3, float("inf")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clipping_as_in_torch(backend, max_norm, dtype, kernels):
    import torch

    for seed in range(3):
        theirs = {
            path: torch.zeros(shape, dtype=getattr(torch, dtype)) for path, shape in SHAPES.items()
        }
        for path, value in gradients(seed).items():
            theirs[path].grad = torch.tensor(value, dtype=getattr(torch, dtype))
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm)
        grads = writable(backend, gradients(seed), dtype)
        with use_kernels(kernels):
            norm = ops.clip_by_global_norm(list(grads.values()), max_norm)
        assert norm.ndim == 0
        assert norm.dtype == getattr(backend.xp, dtype)
        tolerance = 1e-6 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(backend.host(norm), expected.numpy(), rtol=tolerance)
        close(
            backend, grads, {path: value.grad.numpy() for path, value in theirs.items()}, tolerance
        )
        assert all(g.dtype == getattr(backend.xp, dtype) for g in grads.values())


def test_clipping_of_nothing_and_of_too_much(backend):
    for kernels in ("auto", "reference"):
        with use_kernels(kernels):
            zeros = [backend.backend.asarray(np.zeros(4))]
            assert backend.host(ops.clip_by_global_norm(zeros, 1.0)) == 0
            assert (backend.host(zeros[0]) == 0).all()
            wrong = [
                backend.backend.asarray(np.array([1.0, np.nan])),
                backend.backend.asarray(np.ones(2)),
            ]
            assert np.isnan(backend.host(ops.clip_by_global_norm(wrong, 1.0)))
            assert np.isnan(backend.host(wrong[1])).all()
            empty = [
                backend.backend.asarray(np.zeros((0, 3))),
                backend.backend.asarray(np.array([3.0, 4.0])),
            ]
            np.testing.assert_allclose(backend.host(ops.clip_by_global_norm(empty, 1.0)), 5.0)
            np.testing.assert_allclose(backend.host(empty[1]), [0.6, 0.8], rtol=1e-6)


def test_clipping_refuses(backend):
    array = backend.backend.asarray
    for max_norm in (0, -1.0, float("nan")):
        with pytest.raises(ArgumentError, match="clip_by_global_norm: max_norm must be above 0"):
            ops.clip_by_global_norm([array(np.ones(2))], max_norm)
    with pytest.raises(ArgumentError, match="got none"):
        ops.clip_by_global_norm([], 1.0)
    with pytest.raises(ArrayError, match=r"of one dtype.*grads\[1\]"):
        ops.clip_by_global_norm([array(np.ones(2)), array(np.ones(2), "float32")], 1.0)
    with pytest.raises(ArrayError, match="floating point"):
        ops.clip_by_global_norm([array(np.ones(2, dtype=np.int64))], 1.0)


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
def test_numbers_without_a_meaning(kind, arguments, word):
    with pytest.raises(ArgumentError, match=word):
        kind(**arguments)
    with pytest.raises(ArgumentError, match=word):
        make_optimizer(next(name for name, known in OPTIMIZERS.items() if known is kind), arguments)
