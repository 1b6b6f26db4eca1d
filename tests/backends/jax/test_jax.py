"""The JAX backend: arrays that can be written to, and whole steps as one program of XLA."""

import logging
from collections import OrderedDict
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import portacnn
from portacnn import ops, resolve
from portacnn.backends.jax import arrays, compiled
from portacnn.backends.jax.arrays import JaxArray
from portacnn.errors import ArrayError, BackendError, StateError
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU
from portacnn.training import Trainer

HOME = resolve("jax")


def net(device, dtype="float32"):
    model = portacnn.Model(
        *(Conv2d(1, 4, 3), BatchNorm2d(4), ReLU(), MaxPool2d(2), Flatten(), Dropout(0.3)),
        Linear(None, 10),
    )
    return model.build((1, 8, 8), device=device, dtype=dtype, seed=0)


def trained(device="jax", count=40, dtype="float32", **changes):
    x = np.random.default_rng(0).random((count, 1, 8, 8), dtype="float32")
    t = np.arange(count) % 10
    options = {"epochs": 2, "batch_size": 20, "seed": 1, "verbose": False, **changes}
    return Trainer(net(device, dtype), x, t, **options)


# --- arrays ---------------------------------------------------------------------------------------


def test_words_and_types():
    assert resolve("jax:cpu") == resolve("cpu", "jax") == resolve(jnp) == HOME
    assert resolve("jax:cpu:0") == HOME
    with pytest.raises(BackendError, match=r"JAX's devices cpu, got 'tpu:7'; .*pip install"):
        resolve("jax:tpu:7")
    with pytest.raises(BackendError, match=r"JAX's devices cpu, got 'cpu:1'$"):
        resolve("jax:cpu:1")
    raw = jnp.ones((2,))
    assert portacnn.runtime.backend_of(raw).name == "jax"
    assert portacnn.runtime.backend_of(HOME.receive(raw)).name == "jax"
    assert HOME.xp.zeros((1,), dtype=HOME.xp.float32).__array_namespace__() is HOME.xp


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.grad], ids=lambda f: f.__name__)
def test_ops_inside_a_users_own_trace_are_refused(transform):
    with pytest.raises(ArrayError, match=r"cannot be called inside jax\.jit"):
        transform(lambda x: ops.relu(x)[0])(jnp.ones(()) if transform is jax.grad else jnp.ones(2))
    with pytest.raises(ArrayError, match=r"cannot be called inside jax\.jit"):
        jax.jit(net("jax").predict)(jnp.ones((2, 1, 8, 8)))


@pytest.mark.parametrize(
    "key",
    [
        *(..., 1, (0, -1), (slice(1, 3), slice(None, None, 2)), (slice(None, None, -2), 2)),
        *((slice(3, None, -1), slice(4, 1, -2)), (slice(2, 2),), (..., slice(1, -1))),
    ],
    ids=str,
)
def test_writing_to_parts_is_numpys(key):
    expected = np.arange(20, dtype="int32").reshape(4, 5)
    array = HOME.asarray(expected)
    part = array[key]
    values = -1 - np.arange(expected[key].size, dtype="int32").reshape(expected[key].shape)
    before = expected[key].copy()
    expected[key] = values
    array[key] = HOME.asarray(values)
    np.testing.assert_array_equal(np.asarray(array), expected)
    np.testing.assert_array_equal(np.asarray(part), before)  # a slice is no view
    expected[key] += 5
    array[key] += 5
    np.testing.assert_array_equal(np.asarray(array), expected)


def test_64_bits_without_jaxs_global_setting():
    run = trained(dtype="float64", epochs=1, clip_norm=1.0)
    run.train()
    weight = run.model.named_parameters()["0.weight"]
    assert weight.dtype == HOME.xp.float64
    assert run.train_loss_list == pytest.approx(reference("float64")[:2], rel=1e-9)
    assert jnp.zeros((1,)).dtype == jnp.float32
    assert not jax.config.jax_enable_x64


def test_jax_arrays_in_and_out():
    model, x = net("jax"), np.random.default_rng(1).random((3, 1, 8, 8), dtype="float32")
    expected = np.asarray(model.predict(x))
    y = model.predict(jnp.asarray(x))
    assert isinstance(y, jax.Array)
    np.testing.assert_array_equal(np.asarray(y), expected)
    assert isinstance(model.features(jnp.asarray(x), "0"), jax.Array)
    y, cache = ops.relu(jnp.asarray([-1.0, 2.0]))
    assert isinstance(y, jax.Array)
    assert isinstance(ops.relu_backward(jnp.ones(2), cache), jax.Array)
    assert jnp.asarray(model.named_parameters()["6.bias"]).shape == (10,)


# --- a step as one program ------------------------------------------------------------------------


_losses: dict[str, list[float]] = {}


def reference(dtype):
    """The losses of NumPy."""
    if dtype not in _losses:
        run = trained("numpy", dtype=dtype, clip_norm=1.0)
        run.train()
        _losses[dtype] = run.train_loss_list
    return _losses[dtype]


@pytest.mark.parametrize("compile_step", [None, False])
def test_the_losses_are_numpys(compile_step):
    """Dropout with the same bits, batch statistics, clipping and Adam's counts."""
    run = trained(clip_norm=1.0, compile_step=compile_step)
    run.train()
    assert run.train_loss_list == pytest.approx(reference("float32"), rel=2e-5)
    made = run.updater.compiled
    assert isinstance(made, compiled.Compiled) == (compile_step is None)
    if compile_step is None:
        assert (made.kinds, made.reason) == (1, None)


def test_the_data_are_no_constants_of_the_program_and_are_sent_once(monkeypatch):
    run = trained()
    indices = HOME.asarray(np.arange(20))
    run.run_batch(indices)
    (way,) = run.updater.compiled._ways.values()
    held = {id(array) for array in (*way._donated, *way._read)}
    assert id(run._sets.train.images) in held
    assert id(run._sets.train.targets) in held
    assert {id(array) for array in run.model.named_parameters().values()} <= held
    with jax.enable_x64(True):
        text = way._compiled.lower(
            [array.held for array in way._donated],
            [array.held for array in way._read],
            [indices.held, run.updater.ok.held],
            {"step": np.int64(1), "lr": np.float64(0.1), "count": np.int64(1)},
        ).as_text()
    assert max(map(len, text.splitlines())) < 5000  # no constant of any size

    def refuse(*args, **options):
        raise AssertionError("unplanned transfer")

    # what the step takes itself: its three numbers
    monkeypatch.setattr(jax, "device_put", refuse)
    monkeypatch.setattr(JaxArray, "__array__", refuse)
    monkeypatch.setattr(JaxArray, "__float__", refuse)
    monkeypatch.setattr(JaxArray, "__bool__", refuse)
    monkeypatch.setattr(type(HOME), "to_host", refuse)
    for _ in range(3):
        run.run_batch(indices)


def test_memory_that_is_reused_is_never_read_again():
    """Everything that still refers to an old value keeps it."""
    run = trained()
    indices = HOME.asarray(np.arange(20))
    run.run_batch(indices)
    weight = run.model.named_parameters()["6.weight"]
    expected = np.asarray(weight)
    kept = {
        "a copy": HOME.xp.asarray(weight, copy=True),
        "a target": HOME.xp.empty_like(weight),
        "its own array": weight.held,
        "the whole slice": weight[...],
        "JAX": jnp.asarray(weight),
        "DLPack": np.from_dlpack(weight),
        "NumPy": np.asarray(weight),
    }
    kept["a target"][...] = weight
    reused = run.model.named_parameters()["0.weight"].held.unsafe_buffer_pointer()
    for _ in range(3):
        run.run_batch(indices)
    assert not np.array_equal(np.asarray(weight), expected)
    for name, value in kept.items():
        np.testing.assert_array_equal(np.asarray(value), expected, err_msg=name)
    after = run.model.named_parameters()["0.weight"].held.unsafe_buffer_pointer()
    assert isinstance(reused, int)
    assert isinstance(after, int)


def test_another_thread_reads_weights_while_steps_donate_them():
    run, failed, done = trained(), [], Event()
    indices = HOME.asarray(np.arange(20))
    run.run_batch(indices)

    def read():
        while not done.is_set():
            try:
                run.model.state_dict()
            except RuntimeError as error:  # Array has been deleted
                failed.append(error)

    reader = Thread(target=read)
    reader.start()
    for _ in range(200):
        run.run_batch(indices)
    done.set()
    reader.join()
    assert not failed


def test_an_error_while_a_step_is_compiled_changes_nothing(monkeypatch):
    run = trained()
    before = run.model.state_dict()
    original = type(run.optimizer).apply

    def interrupted(*args, **options):
        original(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(run.optimizer), "apply", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run_batch(HOME.asarray(np.arange(20)))
    for path, value in run.model.state_dict().items():
        np.testing.assert_array_equal(value, before[path])
    run.run_batch(HOME.asarray(np.arange(20)))
    assert run.updater.compiled.kinds == 1


@pytest.mark.parametrize(
    ("owner", "name"), [(compiled, "_evaluated"), (compiled.Trace, "survivors")]
)
def test_a_trace_that_is_interrupted_leaves_no_tracers(monkeypatch, owner, name):
    """Also after the step itself: out of memory for the gradients, or Ctrl-C."""
    run, usual, calls = trained(), getattr(owner, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return usual(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_batch(HOME.asarray(np.arange(20)))
    other = trained()
    for one in (run, other):
        one.run_batch(HOME.asarray(np.arange(20)))
    expected = other.model.state_dict()
    for path, value in run.model.state_dict().items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


@dataclass(frozen=True)
class State:
    step: Any
    ok: Any


def state(step=0):
    return State(step, HOME.xp.ones((), dtype=HOME.xp.bool))


def test_what_a_step_makes_and_keeps():
    """A table that is made in the first step, and an array that is observed in each."""
    made, total = {}, HOME.asarray(np.zeros(2))

    def step(x, state):
        if "table" not in made:
            made["table"] = HOME.xp.asarray([1.0, 2.0]) * 10.0
        made["seen"] = x + 1.0
        total[...] += x * made["table"] + HOME.xp.astype(state.step, x.dtype)
        return x * 2.0

    run = HOME.compile_step(step, ())
    for number in range(3):
        y = run(HOME.asarray(np.array([1.0, float(number)])), state(number))
    assert np.asarray(y).tolist() == [2.0, 4.0]
    assert np.asarray(made["table"]).tolist() == [10.0, 20.0]
    assert np.asarray(made["seen"]).tolist() == [2.0, 3.0]
    assert np.asarray(total).tolist() == [33.0, 63.0]


def test_a_hook_that_is_added_later_sees_each_step():
    run, seen = trained(), {}
    indices = HOME.asarray(np.arange(20))
    run.run_batch(indices)
    run.model.layer_at("6").on_output(lambda y: seen.update(y=y))
    values = []
    for _ in range(2):
        run.run_batch(indices)
        values.append(np.asarray(seen["y"]))
    assert values[0].shape == (20, 10)
    assert not np.array_equal(*values)


def test_an_array_that_a_step_makes_from_a_constant_and_writes_to():
    made = {}

    def step(x, state):
        if "total" not in made:
            made["total"] = HOME.xp.asarray([1.0, 2.0])
        made["total"] += x
        return x * 2.0

    run = HOME.compile_step(step, ())
    for number in range(1, 4):
        run(HOME.asarray(np.ones(2)), state(number))
        assert np.asarray(made["total"]).tolist() == [1.0 + number, 2.0 + number]


def test_a_step_that_replaces_what_it_reads_is_refused():
    """Compiled, it would read the same old array in each step."""
    made = {"mean": HOME.asarray(np.zeros(2))}

    def step(x, state):
        made["mean"] = made["mean"] * 0.5 + x
        return made["mean"] * 2.0

    run = HOME.compile_step(step, ())
    for _ in range(2):
        with pytest.raises(StateError, match=r"write to the array instead"):
            run(HOME.asarray(np.ones(2)), state())
    assert np.asarray(made["mean"]).tolist() == [0.0, 0.0]


def test_large_arrays_are_created_on_the_device(monkeypatch):
    xp, sent = HOME.xp, []
    usual = arrays._sent
    monkeypatch.setattr(arrays, "_sent", lambda *args: sent.append(args) or usual(*args))
    large = xp.zeros((2, 1 << 20), dtype=xp.uint8, device=HOME.device)
    xp.ones_like(large)
    assert not sent
    assert xp.full((2, 3), 5.0).shape == (2, 3)
    assert xp.zeros(4).shape == (4,)
    assert len(sent) == 2


def test_each_shape_is_compiled_once_and_most_shapes_are_bounded(monkeypatch, caplog):
    monkeypatch.setattr(compiled, "MOST", 2)
    traced = []

    def step(x, state):
        traced.append(x.shape)
        return x + 1.0

    run = HOME.compile_step(step, ())
    with caplog.at_level(logging.INFO, "portacnn"):
        for size in (1, 2, 1, 2, 3, 3):
            assert np.asarray(run(HOME.asarray(np.zeros(size)), state())).tolist() == [1.0] * size
    assert len(traced) == 2 * 3  # each is traced twice, as nothing is made and kept
    assert run.kinds == 2
    infos = [record.message for record in caplog.records if record.levelno == logging.INFO]
    warnings = [record.message for record in caplog.records if record.levelno > logging.INFO]
    assert len(infos) == 3
    assert "compiled a training step for arrays of 1 in " in infos[0]
    assert len(warnings) == 1
    assert "3 shapes" in warnings[0]


def test_numbers_that_are_equal_but_not_the_same(monkeypatch):
    monkeypatch.setattr(compiled, "_ops", OrderedDict())

    def filled(x, value):
        return HOME.xp.full((1,), value, dtype=HOME.xp.float32) * x

    x = HOME.asarray(np.ones(1, np.float32))
    signs = [np.signbit(np.asarray(compiled.run(filled, x, zero)))[0] for zero in (0.0, -0.0)]
    assert signs == [False, True]
    for _ in range(3):
        compiled.run(filled, x, float("nan"))
    assert len(compiled._ops) == 3


def test_a_step_that_reads_a_value_runs_op_by_op_and_says_so_once(caplog):
    def step(x, state):
        return x * 2.0 if float(x[0]) > 0 else x

    run = HOME.compile_step(step, ())
    for _ in range(2):
        assert np.asarray(run(HOME.asarray(np.ones(2)), state())).tolist() == [2.0, 2.0]
    assert run.reason is not None
    assert ".<locals>.step (test_jax.py, line " in run.reason
    assert len(caplog.records) == 1
    assert "reads a value on the host" in caplog.text


def test_predictions_are_compiled_for_each_shape_and_see_new_weights():
    model, x = net("jax"), np.random.default_rng(1).random((5, 1, 8, 8), dtype="float32")
    twin = net("numpy")
    for count in (1, 5):
        np.testing.assert_allclose(
            np.asarray(model.predict(x[:count])), twin.predict(x[:count]), rtol=1e-4, atol=1e-6
        )
    state = {path: value + 0.25 for path, value in twin.state_dict().items() if "6." in path}
    model.load_state_dict(state, strict=False)
    twin.load_state_dict(state, strict=False)
    seen = []
    handle = model.layer_at("0").on_output(lambda y: seen.append(y.shape))
    for _ in range(2):
        y = np.asarray(model.predict(x))
        np.testing.assert_allclose(y, twin.predict(x), rtol=1e-4, atol=1e-6)
        handle.remove()
    assert seen == [(5, 4, 6, 6)]


def test_a_checkpoint_goes_there_and_back(tmp_path):
    run = trained(epochs=1, checkpoint_dir=tmp_path)
    run.train()
    data = run._sets.train
    x, t = HOME.to_host(data.images), HOME.to_host(data.targets)
    losses = {}
    for device in ("jax", "numpy"):
        again = Trainer.resume(
            tmp_path, x, t, device=device, epochs=2, checkpoint_dir=tmp_path / device
        )
        again.train()
        losses[device] = again.train_loss_list
    np.testing.assert_allclose(losses["jax"], losses["numpy"], rtol=2e-5)
    straight = trained(epochs=2)
    straight.train()
    assert losses["jax"] == straight.train_loss_list  # bit for bit
    back = Trainer.resume(tmp_path / "numpy", x, t, device="jax", epochs=3)
    back.train()
    assert len(back.train_loss_list) == 6
