"""Callbacks: when they are called, what they keep, and that a training with them resumes."""

import copy
import csv
import json
import sys
from contextlib import suppress

import numpy as np
import pytest

from portacnn import EarlyStopping, Trainer
from portacnn.callbacks import (
    EMA,
    Callback,
    CSVLogger,
    JSONLogger,
    KeepBest,
    TensorBoard,
    lr_range_test,
)
from portacnn.errors import ArgumentError, DependencyError, ModelFormatError, StateError
from portacnn.models import Model
from support.matrix import backends, needs
from support.nets import bits
from support.trainings import STEPS, TEST, data, drawing_net, make, outcome, rewrite


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.delenv("PORTACNN_BACKEND", raising=False)


def train(device="numpy", callbacks=(), **options):
    trainer = make(device, kind=Trainer, callbacks=callbacks, **options)
    trainer.train()
    return trainer


class Seen(Callback):
    """Writes down what it is called with."""

    def __init__(self):
        self.calls = []

    def on_train_begin(self, trainer):
        self.calls.append("train begins")

    def on_epoch_begin(self, trainer):
        self.calls.append(f"epoch {trainer.epoch} begins")

    def on_epoch_end(self, trainer, figures):
        self.calls.append(figures)

    def on_train_end(self, trainer):
        self.calls.append("train ends")


class EachStep(Callback):
    every_step = True

    def __init__(self):
        self.losses = []

    def on_step_end(self, trainer, loss):
        self.losses.append(loss)


class Breaking(Callback):
    """Raises once, in the method and at the step that it is told."""

    every_step = True

    def __init__(self, method, step):
        self.method, self.step, self.error = method, step, RuntimeError("mine")

    def _at(self, method, trainer):
        if (method, trainer.steps_done) == (self.method, self.step) and self.error:
            error, self.error = self.error, None
            raise error

    def on_train_begin(self, trainer):
        self._at("on_train_begin", trainer)

    def on_epoch_begin(self, trainer):
        self._at("on_epoch_begin", trainer)

    def on_update(self, trainer, ok):
        self._at("on_update", trainer)

    def on_step_end(self, trainer, loss):
        self._at("on_step_end", trainer)

    def on_epoch_end(self, trainer, figures):
        self._at("on_epoch_end", trainer)

    def on_train_end(self, trainer):
        self._at("on_train_end", trainer)


class Weights(Callback):
    """Keeps the weights after each step, on the host."""

    every_step = True

    def __init__(self):
        self.after = []

    def on_train_begin(self, trainer):
        self.after.append(trainer.model.state_dict())

    def on_step_end(self, trainer, loss):
        self.after.append(trainer.model.state_dict())


# --- calls ----------------------------------------------------------------------------------------


def test_when_they_are_called(backend):
    seen = Seen()
    trainer = train(backend.device, [seen], epochs=2)
    first, second = (
        {name: values[epoch] for name, values in trainer.history.items()} for epoch in (0, 1)
    )
    begins = ("epoch 0 begins", "epoch 1 begins")
    assert seen.calls == ["train begins", begins[0], first, begins[1], second, "train ends"]


def test_each_step_is_read_only_where_one_asks(backend, monkeypatch):
    kind, reads = type(backend.backend), []
    original = kind.to_host

    def to_host(self, array):
        reads.append(tuple(array.shape))
        return original(self, array)

    monkeypatch.setattr(kind, "to_host", to_host)
    plain = train(backend.device, [Seen(), EMA()], epochs=1)
    assert [shape for shape in reads if shape[1:] == (2,)] == [(STEPS, 2)]
    reads.clear()
    each = EachStep()
    trainer = train(backend.device, each, epochs=1)
    assert [shape for shape in reads if shape[1:] == (2,)] == [(1, 2)] * STEPS
    assert each.losses == trainer.train_loss_list == plain.train_loss_list


@pytest.mark.parametrize("looks", [False, True])
def test_what_looks_inside_a_step_has_it_run_as_usual(backend, monkeypatch, looks):
    class Inside(Callback):
        inside_step = looks

        def on_train_begin(self, trainer):
            self.outputs = []
            layer = trainer.model.layer_at("fc")
            self.handle = layer.on_output(lambda y: self.outputs.append(y.shape))

        def on_train_end(self, trainer):
            self.handle.remove()

    taken = []

    def compile_step(self, step, example):
        taken.append("taken")
        return step

    monkeypatch.setattr(type(backend.backend), "compile_step", compile_step)
    inside = Inside()
    trainer = train(backend.device, [inside, EMA()], epochs=1, compile_step=True)
    assert taken == ([] if looks else ["taken"])
    assert inside.outputs.count((8, 4)) >= STEPS - 1
    assert not trainer.model.layer_at("fc").hooks


def test_stop_from_a_callback_continues_exactly():
    class StopAt(EachStep):
        def on_step_end(self, trainer, loss):
            if trainer.steps_done in (3, STEPS):
                trainer.stop()

    trainer = train(callbacks=[StopAt()])
    assert trainer.steps_done == 3
    trainer.train()
    assert (trainer.steps_done, trainer.epoch) == (STEPS, 1)  # the epoch's end is not left out
    trainer.train()
    assert outcome(trainer) == outcome(train())


# --- exceptions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "step", "steps", "epochs"),
    [
        ("on_train_begin", 0, 0, 0),
        ("on_epoch_begin", STEPS, STEPS, 1),
        ("on_update", 4, 4, 0),
        ("on_step_end", 4, 4, 0),
        ("on_step_end", STEPS, STEPS, 0),
        ("on_epoch_end", 2 * STEPS, 2 * STEPS, 2),
        ("on_epoch_end", 3 * STEPS, 3 * STEPS, 3),
        ("on_train_end", 3 * STEPS, 3 * STEPS, 3),
    ],
)
def test_an_exception_stops_between_two_steps(tmp_path, backend, method, step, steps, epochs):
    """The weights are those after so many steps, and all goes on as if nothing had happened."""
    weights = Weights()
    whole = train(backend.device, [EMA(), weights])
    broken, ema, seen = Breaking(method, step), EMA(), Seen()
    trainer = make(
        backend.device, kind=Trainer, callbacks=[ema, seen, broken], checkpoint_dir=tmp_path
    )
    with pytest.raises(RuntimeError, match="mine"):
        trainer.train()
    assert trainer.train_loss_list == whole.train_loss_list[:steps]
    assert trainer.epoch == epochs
    assert all(len(values) == epochs for values in trainer.history.values())
    for path, value in trainer.model.state_dict().items():
        np.testing.assert_array_equal(value, weights.after[steps][path])
    if method != "on_train_begin":
        assert seen.calls[-1] == "train ends"
    trainer.checkpoint(tmp_path / "own")
    if not trainer.finished:
        trainer.train()
    if (method, step) != ("on_step_end", STEPS):
        assert outcome(trainer) == outcome(whole)


def test_the_best_weights_are_there_after_an_exception_at_the_end():
    options = {"early_stopping": EarlyStopping(2), "optimizer_param": {"lr": 0.15}, "epochs": 6}
    whole = train(**options)
    assert whole.stopped_early
    trainer = make(kind=Trainer, callbacks=[Breaking("on_epoch_end", whole.steps_done)], **options)
    with pytest.raises(RuntimeError, match="mine"):
        trainer.train()
    assert outcome(trainer) == outcome(whole)


# --- what is refused ------------------------------------------------------------------------------


class Silent(Callback):
    def on_step_end(self, trainer, loss):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [EMA]}, r"got <class .*; write EMA\(...\)"),
        ({"callbacks": [print]}, "must be portacnn.callbacks.Callback objects"),
        ({"callbacks": 3}, "must be a list of callbacks, got 3"),
        ({"callbacks": [Seen()] * 2}, "the same Seen object twice"),
        ({"callbacks": [Silent()]}, "Silent: it defines on_step_end.*every_step = True"),
        ({"callbacks": [EarlyStopping(2)], "early_stopping": 3}, "expected one EarlyStopping"),
        ({"callbacks": [EarlyStopping(2), EarlyStopping(3)]}, "expected one EarlyStopping"),
    ],
)
def test_what_is_no_callback(options, message):
    with pytest.raises(ArgumentError, match=message):
        make(**options)


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"warm_up": 1}])
def test_ema_of_nonsense(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        EMA(**options)


def test_early_stopping_among_the_callbacks_is_early_stopping():
    options = {"optimizer_param": {"lr": 0.15}, "epochs": 6}
    one = train(callbacks=[EarlyStopping(2), Seen()], **options)
    assert one.stopped_early
    assert outcome(one) == outcome(train(early_stopping=EarlyStopping(2), **options))


# --- averages of weights --------------------------------------------------------------------------


@pytest.mark.parametrize("warm_up", [False, True])
def test_ema_is_the_average_of_the_weights(backend, warm_up):
    ema, weights = EMA(0.8, warm_up=warm_up), Weights()
    trainer = train(backend.device, [ema, weights], epochs=2, dtype="float64")
    average = dict(weights.after[0])
    for n, after in enumerate(weights.after[1:]):
        decay = min(0.8, (1 + n) / (10 + n)) if warm_up else 0.8
        average = {
            p: decay * average[p] + (1 - decay) * value if value.dtype.kind == "f" else value
            for p, value in after.items()
        }
    own = bits(trainer.model)
    with ema.applied(trainer.model):
        figures = trainer.evaluate(*data("float64")[2:])
        for path, value in trainer.model.state_dict().items():
            np.testing.assert_allclose(value, average[path], rtol=1e-12, atol=1e-14)
    assert bits(trainer.model) == own
    assert trainer.history["test_loss"][-1] == pytest.approx(figures["loss"], rel=1e-12)
    assert trainer.evaluate(*data("float64")[2:])["loss"] != figures["loss"]
    ema.copy_to(trainer.model)
    assert trainer.evaluate(*data("float64")[2:])["loss"] == figures["loss"]


def test_ema_changes_no_training(backend):
    plain, averaged = train(backend.device), train(backend.device, [EMA()])
    silent = train(backend.device, [EMA(evaluate=False)])
    assert bits(plain.model) == bits(averaged.model)
    assert plain.train_loss_list == averaged.train_loss_list
    assert plain.history["test_loss"] != averaged.history["test_loss"]
    assert outcome(silent) == outcome(plain)


def test_ema_gives_the_weights_back_after_an_error(backend):
    ema = EMA()
    trainer = train(backend.device, [ema], epochs=1)
    own = bits(trainer.model)
    with pytest.raises(RuntimeError), ema.applied(trainer.model):
        raise RuntimeError
    assert bits(trainer.model) == own


def test_ema_takes_no_step_that_was_not_finite(backend):
    from portacnn.errors import NotFiniteError

    class Poison(Callback):
        def on_update(self, trainer, ok):
            if trainer.steps_done == 4:
                trainer._sets.train.images[...] = np.nan if "numpy" in backend.name else _nan

    _nan = backend.xp.asarray(float("nan"), dtype=backend.xp.float32, device=backend.backend.device)
    weights, ema = Weights(), EMA(0.5, warm_up=False)
    with suppress(NotFiniteError):
        train(backend.device, [ema, weights, Poison()], epochs=1)
    late = EMA(0.5, warm_up=False)
    trainer = make(backend.device, kind=Trainer, callbacks=[late, Poison()], epochs=1)
    with pytest.raises(NotFiniteError):
        trainer.train()  # its losses are read at the end of the epoch only: three steps too late
    expected = dict(weights.after[0])
    for after in weights.after[1:5]:
        expected = {
            p: 0.5 * expected[p] + 0.5 * value if value.dtype.kind == "f" else value
            for p, value in after.items()
        }
    late.copy_to(trainer.model)
    for path, value in trainer.model.state_dict().items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-6)


def test_best_weights_with_ema_are_those_that_were_evaluated():
    trainer = train(callbacks=[EMA()], early_stopping=EarlyStopping(9, "loss"))
    best = min(trainer.test_loss_list)
    assert trainer.evaluate(*data()[2:])["loss"] == pytest.approx(best, rel=1e-6)


def test_ema_without_or_of_another_network():
    with pytest.raises(StateError, match="no averages yet"):
        EMA().copy_to(drawing_net("numpy"))
    ema = EMA()
    train(callbacks=[ema], epochs=1)
    from support.nets import small_net

    with pytest.raises(StateError, match="another network"):
        ema.copy_to(small_net())


def test_a_copy_of_a_trainer_has_callbacks_of_its_own(backend):
    trainer = make(backend.device, kind=Trainer, callbacks=[EMA(), EachStep()], epochs=1)
    trainer.train()
    trainer.epochs = 2
    again = copy.deepcopy(trainer)
    ema, mine = next(iter(trainer.callbacks)), next(iter(again.callbacks))
    before = mine.state_dict()
    trainer.train()
    for name, value in mine.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    again.train()
    for name, value in ema.state_dict().items():
        np.testing.assert_array_equal(mine.state_dict()[name], value)


# --- exact resume ---------------------------------------------------------------------------------


class Counter(Callback):
    """One of somebody's own with a state: it changes the training by it."""

    def __init__(self):
        self.count, self.sums = 0, np.zeros(3)

    def on_epoch_end(self, trainer, figures):
        self.count += 1
        self.sums[self.count % 3] += figures["train_loss"]
        trainer.optimizer.lr = 0.01 / (1 + self.count + self.sums.sum())

    def state_dict(self):
        return {"count": self.count, "sums": self.sums}

    def load_state_dict(self, state):
        self.count, self.sums = state["count"], state["sums"].copy()


def _timeless(path):
    """A log without the figures that differ between two runs."""
    text = path.read_text()
    rows = (
        [json.loads(line) for line in text.splitlines()]
        if path.suffix == ".jsonl"
        else list(csv.DictReader(text.splitlines()))
    )
    return [
        {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows
    ]


KINDS = {
    "ema": lambda folder: EMA(0.9),
    "two": lambda folder: [EMA(0.9), EMA(0.5, evaluate=False)],
    "csv": lambda folder: CSVLogger(folder / "log.csv"),
    "json": lambda folder: JSONLogger(folder / "log.jsonl"),
    "best": lambda folder: KeepBest(folder / "best.safetensors", "loss"),
    "own": lambda folder: Counter(),
    "stopping": lambda folder: [EarlyStopping(1, "loss"), EachStep()],
}


def _files(folder):
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in (".csv", ".jsonl"):
            found[path.name] = _timeless(path)
        else:
            found[path.name] = bits(Model.load(path, device="numpy"))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [4, STEPS, 9])
def test_exact_resume(tmp_path, backend, kind, step):
    """Killed later than the checkpoint: what was written after it does not count."""
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    whole = train(backend.device, KINDS[kind](folders[0]))

    class Killed(Trainer):
        def run_batch(self, *batch):
            super().run_batch(*batch)
            if self.steps_done == 17:
                raise KeyboardInterrupt

    killed = make(
        backend.device,
        kind=Killed,
        callbacks=KINDS[kind](folders[1]),
        checkpoint_dir=tmp_path,
        checkpoint_every=step,
        keep=9,
    )
    if not whole.stopped_early:
        with pytest.raises(KeyboardInterrupt):
            killed.train()
    else:
        killed.train()
    first = min(tmp_path.glob("checkpoint-*"))
    again = Trainer.resume(
        first,
        *data(),
        device=backend.device,
        callbacks=KINDS[kind](folders[1]),
        checkpoint_dir=tmp_path / "more",
    )
    assert again.steps_done == step
    again.train()
    assert outcome(again) == outcome(whole)
    assert _files(folders[1]) == _files(folders[0])
    for one, other in zip(again.callbacks, whole.callbacks, strict=True):
        assert one.state_dict().keys() == other.state_dict().keys()
        for name, value in one.state_dict().items():
            np.testing.assert_array_equal(value, other.state_dict()[name])


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([], "has the callbacks EMA, got none; pass the same kinds"),
        ([EMA(), EMA()], "has the callbacks EMA, got EMA, EMA-2"),
        ([Counter()], "has the callbacks EMA, got Counter"),
        ([EMA(0.5)], "averages with decay=0.999, got 0.5"),
        ([EMA(), EarlyStopping(2)], "has no early stopping, got EarlyStopping"),
    ],
)
def test_resume_refuses_other_callbacks(tmp_path, callbacks, message):
    path = train(callbacks=[EMA()], epochs=1).checkpoint(tmp_path / "one")
    with pytest.raises(ArgumentError, match=message):
        Trainer.resume(path, *data(), callbacks=callbacks)


def test_resume_takes_the_same_early_stopping(tmp_path):
    given = {"callbacks": [EarlyStopping(2)]}
    path = train(**given, epochs=1).checkpoint(tmp_path / "one")
    assert Trainer.resume(path, *data(), **given).early_stopping.patience == 2
    with pytest.raises(ArgumentError, match=r"patience=2.*got EarlyStopping\(patience=3"):
        Trainer.resume(path, *data(), callbacks=[EarlyStopping(3)])


@pytest.mark.parametrize(
    "nonsense",
    [None, [], "EMA", {"EMA": None}, {"EMA": 3}, {"EMA": {"decay": 0.999, "warm_up": True}}],
)
def test_a_checkpoint_with_nonsense_for_callbacks(tmp_path, nonsense):
    path = train(callbacks=[EMA()], epochs=1).checkpoint(tmp_path / "one")

    def change(header):
        header["callbacks"] = nonsense

    rewrite(path, change)
    with pytest.raises(ModelFormatError):
        Trainer.resume(path, *data(), callbacks=[EMA()])


def test_a_checkpoint_with_averages_of_another_network(tmp_path):
    path = train(callbacks=[EMA()], epochs=1).checkpoint(tmp_path / "one")
    trainer = Trainer.resume(path, *data(), callbacks=[EMA()], epochs=2)
    ema = next(iter(trainer.callbacks))
    state = ema.state_dict()
    del state["average.fc.weight"]
    ema.load_state_dict(state)
    with pytest.raises(ModelFormatError, match=r"EMA: .*missing: fc\.weight"):
        trainer.train()


def test_a_state_that_a_file_cannot_hold(tmp_path):
    class Bad(Callback):
        def state_dict(self):
            return {"function": print}

    trainer = make(callbacks=[Bad()])
    with pytest.raises(ArgumentError, match="Bad: state_dict must return NumPy arrays and JSON"):
        trainer.checkpoint(tmp_path / "one")


# --- files ----------------------------------------------------------------------------------------


def test_logs_hold_the_history(tmp_path, backend):
    loggers = [CSVLogger(tmp_path / "new" / "log.csv"), JSONLogger(tmp_path / "log.jsonl")]
    (tmp_path / "log.jsonl").write_text("of an earlier training\n")
    metrics = {"hits": "accuracy", "table": "confusion_matrix"}
    trainer = train(backend.device, loggers, metrics=metrics)
    with (tmp_path / "new" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    names = ["epoch", *trainer.history]
    assert [list(row) for row in (*rows, *lines)] == [names] * 6
    for epoch, (row, line) in enumerate(zip(rows, lines, strict=True)):
        for name in trainer.history:
            value = trainer.history[name][epoch]
            assert json.loads(row[name]) == line[name] == value
        assert int(row["epoch"]) == line["epoch"] == epoch + 1
    assert np.sum(lines[0]["test_table"]) == TEST


def test_json_lines_have_no_nan(tmp_path):
    logger, nan = JSONLogger(tmp_path / "log"), float("nan")
    logger.path.touch()

    class Here:
        epoch = 1

    logger.on_epoch_end(Here(), {"a": nan, "b": [1.0, -float("inf")], "c": 0.5})
    line = json.loads(logger.path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert line == {"epoch": 1, "a": None, "b": [1.0, None], "c": 0.5}


def test_keep_best_saves_what_was_evaluated(tmp_path):
    best = KeepBest(tmp_path / "best", "loss")
    trainer = train(callbacks=[EMA(), best], epochs=6, optimizer_param={"lr": 0.15})
    figures = trainer.test_loss_list
    assert figures.index(min(figures)) < 5, "the test needs a best epoch before the last"
    loss = Model.load(tmp_path / "best", device="numpy").loss(*data()[2:])
    assert loss == pytest.approx(min(figures), rel=1e-6)
    with pytest.raises(ArgumentError, match="KeepBest monitors 'f1'"):
        train(callbacks=[KeepBest(tmp_path / "best", "f1")])


@pytest.mark.parametrize("kind", [CSVLogger, JSONLogger, KeepBest])
def test_a_path_that_is_none(kind):
    with pytest.raises(ArgumentError, match="expected the path of"):
        kind(3)


@needs("tensorboard")
def test_tensorboard_reads_it(tmp_path):
    """Two files: of a training that was killed after its checkpoint, and of the one that
    resumed."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole = train(epochs=3)
    path = train(callbacks=[TensorBoard(tmp_path / "a")], epochs=1).checkpoint(tmp_path / "one")
    callbacks = [TensorBoard(tmp_path / "a")]
    for epochs in (2, 3):  # the second one begins at the first epoch's end, too
        Trainer.resume(path, *data(), callbacks=callbacks, epochs=epochs).train()
    read = EventAccumulator(str(tmp_path / "a"))
    read.Reload()
    losses = [(event.step, event.value) for event in read.Scalars("loss")]
    assert [step for step, _ in losses] == list(range(1, 3 * STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in losses], whole.train_loss_list, rtol=1e-6)
    tested = [(event.step, event.value) for event in read.Scalars("test_loss")]
    assert [step for step, _ in tested] == [STEPS, 2 * STEPS, 3 * STEPS]
    np.testing.assert_allclose([loss for _, loss in tested], whole.test_loss_list, rtol=1e-6)


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    for name in ("tensorboard", "tensorboardX"):
        for module in [name, *(known for known in sys.modules if known.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match="pip install tensorboard"):
        TensorBoard(tmp_path)


# --- learning-rate range test ---------------------------------------------------------------------


def test_a_range_test_leaves_no_trace(backend):
    def run(test):
        trainer = make(backend.device, kind=Trainer, optimizer="momentum", epochs=2)
        trainer.epochs = 1
        trainer.train()
        trainer.epochs = 2
        if test:
            lr_range_test(trainer, 1e-4, 10.0, steps=12)
        trainer.train()
        return trainer

    tested, plain = run(True), run(False)
    assert outcome(tested) == outcome(plain)
    assert tested.optimizer.steps == plain.optimizer.steps


@backends("numpy")
def test_a_range_test_on_a_known_loss(backend):
    """With SGD from the same weights, each step's loss is that of a training written out here."""
    from portacnn.optim import SGD

    trainer = make(kind=Trainer, optimizer="sgd", dtype="float64")
    result = lr_range_test(trainer, 0.01, 1.0, steps=9)
    np.testing.assert_allclose(result.rates, np.geomspace(0.01, 1.0, 9), rtol=1e-12)

    class Growing(Callback):
        def on_epoch_begin(self, trainer):
            trainer.schedule = lambda step, lr: np.geomspace(0.01, 1.0, 9)[min(step, 8)]

    growing = {"optimizer": SGD(0.1), "optimizer_param": None, "callbacks": [Growing()]}
    again = make(kind=Trainer, **growing, dtype="float64", epochs=2)
    again.train()
    np.testing.assert_allclose(result.losses, again.train_loss_list[:9], rtol=1e-9)


def test_a_range_test_ends_where_the_loss_diverges():
    trainer = make(kind=Trainer, optimizer="sgd", loss="cross_entropy")
    before = bits(trainer.model)
    result = lr_range_test(trainer, 1e-3, 1e38, steps=40)
    assert len(result.losses) == len(result.rates) == len(result.smoothed) < 40
    assert np.isfinite(result.losses).all()
    assert bits(trainer.model) == before
    assert trainer.train_loss_list == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lowest": 0.0}, "lowest must be a number above 0"),
        ({"lowest": 2.0}, "lowest must be below highest"),
        ({"steps": 1}, "steps must be a whole number of at least 2"),
    ],
)
def test_a_range_test_of_nonsense(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        lr_range_test(make(kind=Trainer), **arguments)


def test_its_suggestion_is_the_steepest_fall():
    """On losses made up: a logistic fall around 0.01 with noise."""
    trainer = make(kind=Trainer)
    rng, calls = np.random.default_rng(0), []

    def run_batch(*batch):
        rate = trainer.lr(0)
        calls.append(rate)
        trainer.train_loss_list.append(2.0 - 1.5 / (1 + (0.01 / rate) ** 1.5) + 0.02 * rng.normal())

    trainer.run_batch, trainer._read_losses = run_batch, lambda: None
    result = lr_range_test(trainer, 1e-5, 1.0, steps=100)
    assert 0.005 < result.suggestion < 0.02
    assert len(calls) == 100


def test_its_picture(tmp_path):
    pytest.importorskip("matplotlib")
    result = lr_range_test(make(kind=Trainer, optimizer="sgd"), steps=30)
    figure = result.plot(tmp_path / "rates.png")
    curve, smoothed, *_ = figure.axes[0].lines
    np.testing.assert_allclose(curve.get_xydata(), np.c_[result.rates, result.losses])
    np.testing.assert_allclose(smoothed.get_ydata(), result.smoothed)
    assert figure.axes[0].get_xscale() == "log"
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
