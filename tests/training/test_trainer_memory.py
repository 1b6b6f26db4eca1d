"""A device's memory: sets that do not fit stay on the host, and a step without enough memory leaves
everything as it was."""

import re
import weakref

import numpy as np
import pytest

from portacnn import Normalize, Trainer
from portacnn.errors import OutOfMemoryError
from portacnn.models import Model
from portacnn.training import trainer as trainer_module
from portacnn.training.feed import Samples, Streamed, fits
from support.matrix import EACH_LIBRARY
from support.nets import as_bytes, bits, patches
from support.nets import normed_net as net


def trainer(backend, data=patches, **changes):
    model = net(backend.device)
    model.preprocess = Normalize()
    options = {
        "epochs": 2,
        "mini_batch_size": 20,
        "optimizer_param": {"lr": 0.01},
        "verbose": False,
        **changes,
    }
    (x, t), test = data(50), patches(20, seed=1)
    return Trainer(model, x, t, *test, **options)


def small(monkeypatch, backend, free):
    monkeypatch.setattr(type(backend.backend), "free_memory", lambda self: free)


@pytest.mark.parametrize(
    ("nbytes", "free", "expected"),
    [(10, None, True), (10, 20, True), (10, 19, False), (0, 0, True)],
)
def test_half_of_what_is_free(nbytes, free, expected):
    assert fits(nbytes, free) is expected


@EACH_LIBRARY
@pytest.mark.parametrize("bytes_", [False, True], ids=["float32", "uint8"])
def test_batches_from_the_host_are_those_from_the_device(backend, monkeypatch, bytes_):
    def data(count):
        x, t = patches(count)
        return (as_bytes(x) if bytes_ else x), t

    there = trainer(backend, data)
    there.train()
    if backend.backend.name == "numpy":
        monkeypatch.setattr(trainer_module, "make_feed", Streamed)
    small(monkeypatch, backend, 1000)
    here = trainer(backend, data)
    assert here.x_train.dtype == data(1)[0].dtype
    assert isinstance(here.x_train, np.ndarray)
    here.train()
    assert here.train_loss_list == there.train_loss_list
    assert here.test_acc_list == there.test_acc_list
    assert bits(here.model) == bits(there.model)


def test_the_next_batch_is_sent_before_the_last_is_used(backend, monkeypatch):
    events = []
    feed = Streamed(net(backend.device), Samples(np.arange(25.0), backend.array(np.arange(25))))
    monkeypatch.setattr(
        feed._uploader, "send", lambda *parts: events.append(len(parts[0])) or parts
    )
    monkeypatch.setattr(feed._uploader, "receive", lambda sent: sent)
    for x, t, indices in feed.epoch(np.arange(25)[::-1], [10, 10, 5]):
        events.append(x[0])
        assert (t == indices).all()
    assert events == [10, 10, 24.0, 5, 14.0, 4.0]


@EACH_LIBRARY
@pytest.mark.parametrize("place", ["forward", "backward", "update"])
@pytest.mark.parametrize("known", [(1000, 5000), None], ids=["with figures", "without"])
def test_a_step_without_memory_changes_nothing(backend, monkeypatch, place, known):
    """It is said with the batch size and the bytes, nothing has changed, and a smaller batch goes
    on."""
    run = trainer(backend, epochs=1)
    run.run_batch(run.backend.asarray(np.arange(20)))
    before, steps = bits(run.model), run.optimizer.steps

    def full(*_, **__):
        raise MemoryError("full")

    monkeypatch.setattr(type(backend.backend), "memory_error", lambda self, error: known)
    owner = {
        "forward": run.model.children["fc"],
        "backward": run.model.children["conv"],
        "update": run.optimizer,
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, {"update": "apply"}.get(place, place), full)
        figures = re.escape(" (1000 bytes requested, 5000 in use)") if known else ""
        with pytest.raises(
            OutOfMemoryError,
            match=rf"a training step of 20 images{figures}; .*smaller "
            r"batch_size",
        ):
            run.run_batch(run.backend.asarray(np.arange(20, 40)))
    assert bits(run.model) == before
    assert run.optimizer.steps == steps
    x, t = patches(50)
    again = Trainer(run.model, x, t, x, t, mini_batch_size=10, epochs=1, verbose=False)
    again.train()
    assert isinstance(run.model, Model)
    assert all(np.isfinite(again.train_loss_list))


@EACH_LIBRARY
def test_each_librarys_own_error_is_an_out_of_memory_error(backend, monkeypatch):
    """PyTorch's and JAX's are RuntimeErrors."""
    run = trainer(backend, epochs=1, compile_step=False)  # a compiled step would leave it out
    before = bits(run.model)

    def petabyte(*_, **__):
        xp = backend.xp
        backend.host(xp.zeros((1 << 50,), dtype=xp.uint8, device=run.backend.device))

    monkeypatch.setattr(run.model.children["fc"], "backward", petabyte)
    with pytest.raises(OutOfMemoryError, match="smaller batch_size"):
        run.run_batch(run.backend.asarray(np.arange(20)))
    assert bits(run.model) == before


@EACH_LIBRARY
def test_running_statistics_without_memory_change_nothing(backend, monkeypatch):
    """What is left out after a loss that is not finite takes memory as well: the update comes after
    it, if it comes at all."""
    run = trainer(backend, epochs=1)
    before = bits(run.model)
    isfinite, xp = run.backend.xp.isfinite, run.backend.xp

    def full(*_):
        raise MemoryError("full")

    def forward(*args, **options):
        monkeypatch.setattr(xp, "where", full)
        return isfinite(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(xp, "isfinite", forward)
        with pytest.raises(OutOfMemoryError):
            run.run_batch(run.backend.asarray(np.arange(20)))
    monkeypatch.undo()
    assert bits(run.model) == before


@EACH_LIBRARY
def test_an_optimizers_state_without_memory_is_made_the_next_time(backend, monkeypatch):
    """What was not made is made the next time."""
    run = trainer(backend, epochs=1)
    fresh, made = run.optimizer.fresh, []

    def full(slot, p):
        made.append(slot)
        if len(made) > 2:
            raise MemoryError("full")
        return fresh(slot, p)

    with monkeypatch.context() as patch:
        patch.setattr(run.optimizer, "fresh", full)
        with pytest.raises(OutOfMemoryError):
            run.run_batch(run.backend.asarray(np.arange(20)))
    run.run_batch(run.backend.asarray(np.arange(20)))
    assert all(
        run.optimizer.state[slot].keys() == run.model.named_parameters().keys()
        for slot in run.optimizer.slots
    )


class Large:
    """What a step has made so far."""


@EACH_LIBRARY
def test_an_error_holds_nothing_of_the_step(backend, monkeypatch):
    """Whoever looks at it may go on from there with a smaller batch: the large one's memory has to
    be free by then."""
    run, seen = trainer(backend, epochs=1), []

    def full(*_, **__):
        large = Large()
        seen.append(weakref.ref(large))
        raise MemoryError("full")

    monkeypatch.setattr(run.model.children["conv"], "backward", full)
    with pytest.raises(OutOfMemoryError) as caught:
        run.run_batch(run.backend.asarray(np.arange(20)))
    assert caught.value.__cause__ is not None
    assert seen[0]() is None
