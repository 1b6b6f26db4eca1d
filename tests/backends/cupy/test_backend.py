"""CuPy's backend, on the stand-in for CuPy: devices that are current or not, memory, and batches on
their way."""

from dataclasses import dataclass

import numpy as np
import pytest

from portacnn import Trainer, load, ops, resolve
from portacnn.device_runtime import Uploader
from portacnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, ReLU
from portacnn.models import Model
from portacnn.ops.dispatch import use_kernels
from portacnn.optim import make_optimizer
from portacnn.runtime import Backend, where
from portacnn.training.feed import Streamed
from support import fake_cupy
from support.fake_cupy import OutOfMemoryError, log, machine
from support.nets import bits, patches, small_net


@pytest.fixture(autouse=True)
def cp():
    """Without kernels of our own: these are about the host's side."""
    with fake_cupy.installed() as cupy, use_kernels("reference"):
        yield cupy


@pytest.fixture(params=[0, 1])
def home(request):
    """CuPy on device 0, which is the current one, and on device 1, which is not."""
    return resolve(f"cuda:{request.param}")


def net(home):
    layers = {"conv": Conv2d(1, 2, 3), "bn": BatchNorm2d(2), "relu": ReLU(), "drop": Dropout(0.2)}
    return Model(**layers, flatten=Flatten(), fc=Linear(None, 4)).build(
        (1, 8, 8), device=home, seed=0
    )


# --- the namespace --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Nothing:
    """A step's state with nothing in it."""


@pytest.mark.parametrize("axis", [0, -1, None])
@pytest.mark.parametrize("count", [1, 8, 9, 20])
@pytest.mark.parametrize("name", ["concat", "stack"])
def test_a_capture_joins_arrays_and_sends_nothing(home, count, axis, name):
    rng = np.random.default_rng(count)
    if name == "stack":
        axis = axis or 0
    shapes = (
        [(3, 4)] * count
        if name == "stack"
        else [((n % 3) + 1, 4) if axis != -1 else (3, n + 1) for n in range(count)]
    )
    arrays = [rng.random(shape, "float32") for shape in shapes]
    there = [home.asarray(array) for array in arrays]
    step = home.compile_step(lambda *given: getattr(home.xp, name)(given[:-1], axis=axis), ())
    with log.watch() as seen:
        for _ in range(4):
            joined = step(*there, Nothing())
    assert (step.graphs, step.reason) == (1, None)
    assert not [event for event in seen if event.kind in ("h2d", "sync")]
    launched = {event.detail for event in seen if event.kind == "launch"}
    assert count <= 8 or not launched & {
        "concatenate",
        "stack",
    }  # nor do the steps before: what is compiled then is what is needed
    expected = np.concatenate(arrays, axis) if name == "concat" else np.stack(arrays, axis)
    assert (joined.device, joined.dtype) == (home.device, expected.dtype)
    assert np.array_equal(home.to_host(joined), expected)


def test_clip_and_sign_wait_for_nothing(home):
    xp, x = home.xp, np.array([-2.0, -0.5, -0.0, 0.0, 0.5, np.nan, np.inf], "float32")
    there = home.asarray(x)
    with home.active():
        with log.watch() as seen:
            found = [
                xp.clip(there, -1, 1),
                xp.clip(there, max=0.25),
                xp.clip(there, 0.0),
                xp.clip(there, 1, -1),
                xp.sign(there),
            ]
        assert {event.kind for event in seen} <= {"launch", "malloc"}
        expected = [
            np.clip(x, -1, 1),
            np.minimum(x, 0.25),
            np.maximum(x, 0),
            np.clip(x, 1, -1),
            np.sign(x),
        ]
        for got, wanted in zip(found, expected, strict=True):
            assert got.dtype == x.dtype
            np.testing.assert_array_equal(home.to_host(got), wanted)
        whole = home.asarray(np.array([-3, 0, 300]))
        assert home.to_host(xp.clip(whole, 0, 255)).tolist() == [0, 0, 255]
        assert home.to_host(xp.sign(whole)).tolist() == [-1, 0, 1]
        bound = np.full(7, -1, "float32")
        np.testing.assert_array_equal(
            home.to_host(xp.clip(there, home.asarray(bound), None)), np.maximum(x, bound)
        )
    assert home.xp is resolve("cuda").xp


# --- devices --------------------------------------------------------------------------------------


def test_everything_of_a_model_is_on_its_device(home, tmp_path):
    model, (x, t) = net(home), patches(6)
    twin = net("numpy")
    for array in (*model.named_parameters().values(), *model.named_buffers().values()):
        assert array.device == home.device
    logits = model.predict(x)
    assert logits.device == home.device
    np.testing.assert_allclose(home.to_host(logits), twin.predict(x), rtol=1e-5, atol=1e-6)
    assert model.loss(x, t) == pytest.approx(twin.loss(x, t), rel=1e-5)
    assert model.accuracy(x, t, 4) == twin.accuracy(x, t)
    assert all(g.device == home.device for g in model.gradient(x, t).values())
    y, cache = model.forward(model.accept(x), train=True)
    assert y.device == model.backward(y, cache).device == home.device
    model.save(tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors", device=home)
    assert bits(again) == bits(model)
    again.load_state_dict(model.state_dict())
    assert bits(again) == bits(model)
    assert np.array_equal(
        home.to_host(again.predict(home.asarray(x))), home.to_host(model.predict(x))
    )


def test_moving_between_devices(cp):
    model, (x, _) = net("cuda:0"), patches(4)
    before, expected = bits(model), model.predict(x).get()
    model.to("cuda:1")
    assert bits(model) == before
    assert {array.device.id for array in model.named_parameters().values()} == {1}
    assert model.named_parameters().flats[0].whole.device.id == 1
    assert np.array_equal(model.predict(x).get(), expected)
    assert cp.cuda.Device().id == 0


def test_ops_follow_their_arrays(cp, home):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 3, 6, 6)), rng.standard_normal((4, 3, 3, 3))
    y, cache = ops.conv2d(home.asarray(x), home.asarray(w))
    y0, cache0 = ops.conv2d(x, w)
    assert y.device == home.device
    np.testing.assert_allclose(home.to_host(y), y0, atol=1e-12)
    dx, dw, _ = ops.conv2d_backward(y, cache)
    dx0, dw0, _ = ops.conv2d_backward(y0, cache0)
    assert dx.device == dw.device == home.device
    np.testing.assert_allclose(home.to_host(dx), dx0, atol=1e-11)
    np.testing.assert_allclose(home.to_host(dw), dw0, atol=1e-11)
    t = np.array([1, 3])
    loss, kept = ops.softmax_cross_entropy(home.asarray(x[:, :, 0, 0]), home.asarray(t % 3))
    assert ops.softmax_cross_entropy_backward(1.0, kept).device == loss.device == home.device
    p, g = [home.asarray(x)], [home.asarray(2 * x)]  # a list, in the first place
    ops.sgd_update(p, g, lr=0.5)
    assert not home.to_host(p[0]).any()
    assert cp.cuda.Device().id == 0


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_optimizer_by_itself(cp, home, name):
    rng = np.random.default_rng(0)
    host, gradients = rng.standard_normal(5), rng.standard_normal((3, 5))
    found = []
    for place in (home, resolve("numpy")):
        optimizer, p = make_optimizer(name, {"lr": 0.1}), place.asarray(host)
        for gradient in gradients:
            optimizer.update({"p": p}, {"p": place.asarray(gradient)})
        found.append(place.to_host(p))
    np.testing.assert_allclose(*found, rtol=1e-12)
    assert cp.cuda.Device().id == 0


def test_only_ops_on_another_device_change_devices(monkeypatch):
    entered = []
    monkeypatch.setattr(machine.Device, "__enter__", lambda self: entered.append(self.id) or self)
    monkeypatch.setattr(machine.Device, "__exit__", lambda self, *_: None)
    x = resolve("cuda:0").xp.ones((2, 3), dtype="float32")
    ops.relu(x)
    assert entered == []


def test_the_device_that_is_active(cp):
    home = resolve("cuda:1")
    x = home.asarray(np.ones(3))
    with home.active(), home.active():
        assert home.xp.zeros((2,)).device.id == 1
        with where(resolve("cuda:0").asarray(np.ones(3))):
            assert cp.cuda.Device().id == 0
        assert cp.cuda.Device().id == 1
    assert cp.cuda.Device().id == 0
    with where(x):
        assert (x + 1).device.id == 1


def test_no_other_backend_has_a_current_device():
    other = Backend("any", np, "cpu")
    assert not other.enters
    assert other.elsewhere("cpu") is None
    numpy = resolve("numpy")
    with where(np.ones(2)), numpy.active():
        assert numpy.free_memory() is None


def test_training_on_either_device_is_the_same(home):
    model = net(home)
    with log.watch() as seen:
        run = Trainer(
            model, *patches(50), *patches(20, seed=1), mini_batch_size=20, epochs=2, verbose=False
        )
        run.train()
    other = Trainer(
        net("cuda:0"),
        *patches(50),
        *patches(20, seed=1),
        mini_batch_size=20,
        epochs=2,
        verbose=False,
    )
    other.train()
    assert run.train_loss_list == other.train_loss_list
    assert bits(model) == bits(other.model)
    sent = [event.nbytes for event in seen if event.kind == "h2d"]
    assert sent == [50 * 8, 50 * 256, 20 * 8, 20 * 256, 50 * 8, 50 * 8], (
        "labels, images, and an order an epoch"
    )
    # losses of steps, two accuracies and the test loss an epoch; once what the model is to know
    assert sum(event.kind == "d2h" for event in seen) == 2 * 4 + 1


def test_contiguous_keeps_a_numbers_shape(home):
    with home.active():
        assert home.contiguous(home.xp.sum(home.asarray(np.ones(3)))).shape == ()
        x = home.asarray(np.arange(6.0).reshape(2, 3))
        assert home.contiguous(x) is x
        assert home.contiguous(x.T).flags.c_contiguous


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 9_999_999_999])
def test_bytes_of_an_error(limit):
    home = resolve("cuda")
    error = OutOfMemoryError(1_234_567, 89_000_000_512, limit)
    assert home.memory_error(error) == (1_234_567, 89_000_000_512)
    assert home.memory_error(MemoryError("no room")) is None
    assert home.memory_error(RuntimeError(str(error))) is None


def test_free_memory(cp, home):
    with home.active():
        machine.default_pool.free_all_blocks()
        before = home.free_memory()
        x = cp.empty((1 << 20,), dtype="uint8")
    assert home.free_memory() == before - (1 << 20)
    del x
    assert home.free_memory() == before


def test_a_set_that_does_not_fit_is_streamed(home):
    fake_cupy.capacity[home.device.id] = machine._held[home.device.id] + 1_400_000
    x, t = patches(3000)  # 768,000 bytes of images
    run = Trainer(
        small_net(home), x, t, *patches(20, seed=1), mini_batch_size=300, epochs=2, verbose=False
    )
    assert isinstance(run._feed, Streamed)
    run.train()
    fake_cupy.capacity[0] = 8 << 30
    other = Trainer(
        small_net("cuda:0"),
        x,
        t,
        *patches(20, seed=1),
        mini_batch_size=300,
        epochs=2,
        verbose=False,
    )
    other.train()
    assert not isinstance(other._feed, Streamed)
    assert run.train_loss_list == other.train_loss_list


# --- batches on their way -------------------------------------------------------------------------


def batches(count, size=5):
    rng = np.random.default_rng(0)
    return [(rng.random((size, 3), np.float32), rng.integers(0, 9, size)) for _ in range(count)]


def test_sent_batches_arrive(cp, home):
    """Whatever is computed in between, in whatever order the copies really happen."""
    uploader, hosts = home.uploader(), batches(12)
    assert isinstance(uploader, Uploader)
    found, waiting = [], None
    with home.active():
        kept = cp.zeros((5, 3), dtype="float32")
        for x, t in hosts:
            x, t = x.copy(), t.copy()
            sent = uploader.send(x, t)
            x[...], t[...] = -1, -1  # the caller's again
            if waiting is not None:
                xd, td = uploader.receive(waiting)
                kept += xd
                found.append((xd * 1, td * 1))
            waiting = sent
        found.append(tuple(a * 1 for a in uploader.receive(waiting)))
    for (x, t), (xd, td) in zip(hosts, found, strict=True):
        assert (xd.dtype, td.dtype, xd.device) == (x.dtype, t.dtype, home.device)
        assert np.array_equal(home.to_host(xd), x)
        assert np.array_equal(home.to_host(td), t)


def test_nobody_waits_but_for_the_copy_before_last():
    home = resolve("cuda")
    uploader, hosts = home.uploader(), batches(5)
    with log.watch() as seen:
        for x, t in hosts:
            uploader.receive(uploader.send(x, t))
    assert [(e.kind, e.detail) for e in seen if e.kind in ("h2d", "sync", "d2h")] == [
        *[("h2d", "pinned")] * 4,
        *[("sync", "event"), ("h2d", "pinned"), ("h2d", "pinned")] * 3,
    ]


def test_a_copy_does_not_wait_for_work_given_later(cp):
    """It is ordered after what was there when it was sent, so that the next step can run beside
    it."""
    home = resolve("cuda")
    uploader = home.uploader()
    first = uploader.send(np.ones(4, "float32"))
    (x,) = uploader.receive(first)
    second = uploader.send(np.ones(4, "float32"))
    y = x + 1  # a step with the first batch
    with uploader._stream, pytest.raises(fake_cupy.RaceError):
        y + 1
    with pytest.raises(fake_cupy.RaceError, match="may still be writing"):
        second.arrays[0] + 1  # not received
    (z,) = uploader.receive(second)
    assert (z + y).get().tolist() == [3] * 4


@pytest.mark.parametrize("sizes", [(3, 7, 2), (0, 4, 0)])
def test_batches_of_any_size(sizes):
    home = resolve("cuda")
    uploader = home.uploader()
    for size in sizes:
        host = np.arange(size * 700.0).reshape(size, 700)
        one, other = uploader.receive(uploader.send(host[:, ::2], host.astype("uint8")))
        assert np.array_equal(home.to_host(one), host[:, ::2])
        assert np.array_equal(home.to_host(other), host.astype("uint8"))
