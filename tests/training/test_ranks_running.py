"""What ranks do together besides the steps: files, callbacks, stops, errors, refusals, resuming;
and which data each of them reads. Ranks are threads here."""

import copy
import pickle
from itertools import chain, pairwise

import numpy as np
import pytest

from portacnn import Trainer
from portacnn.callbacks import EMA, Callback, CSVLogger, KeepBest, lr_range_test
from portacnn.data import Dataset, Rows, Stream
from portacnn.errors import ArgumentError, CheckpointError, NotFiniteError, StateError
from portacnn.files import load_tensors
from portacnn.layers import BatchNorm1d, Flatten, Linear
from portacnn.metrics import METRICS, AveragePrecision, Metric, TopK
from portacnn.models import Model
from portacnn.training.feed import Samples
from portacnn.training.ranks import Ranks
from portacnn.training.shares import Share, Split, spread
from support.nets import bits, patches
from support.ranks import ThreadCommunicator, on_ranks
from support.trainings import rewrite

X, T = patches(20)


def linear_net(dtype="float64", seed=0):
    net = Model(flat=Flatten(), fc=Linear(64, 4))
    return net.build((1, 8, 8), device="numpy", dtype=dtype, seed=seed)


def make(communicator=None, x=X, t=T, net=linear_net, kind=Trainer, **options):
    standard = {"epochs": 2, "batch_size": 8, "optimizer": "sgd", "lr": 0.1, "verbose": False}
    data = (x, t, X[:5], T[:5] if t is None else t[:5])
    return kind(net(), *data, distributed=communicator, **{**standard, **options})


def train(communicator=None, **options):
    trainer = make(communicator, **options)
    trainer.train()
    return trainer


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "most", "ranks"), [(23, 23, 3), (23, 8, 4), (8, 3, 2), (4, 4, 4)]
)
def test_each_image_of_a_batch_belongs_to_one_rank(count, most, ranks):
    shares = [Split(most, rank, ranks).of(count) for rank in range(ranks)]
    positions = [share.positions() for share in shares]
    assert sorted(chain.from_iterable(positions)) == list(range(count))
    assert max(map(len, positions)) - min(map(len, positions)) <= 1
    for number in range(len(shares[0].parts)):  # the parts of one process, in pieces
        pieces = [share.parts[number] for share in shares]
        assert all(a + n == b for (a, n), (b, _) in pairwise(pieces))
    alone = Split(most).of(count)
    assert [sum(n for _, n in part) for part in zip(*(s.parts for s in shares), strict=True)] == [
        n for _, n in alone.parts
    ]


def test_images_that_come_along():
    share = Share(10, ((0, 2), (5, 3)), before=2)
    assert share.positions() == [8, 9, 0, 1, 3, 4, 5, 6, 7]
    assert share.rows == 9
    assert share.own(np.arange(9)[:, None]).ravel().tolist() == [2, 3, 6, 7, 8]
    order, sizes = Split(8, 1, 2, 1).epoch(np.arange(100, 112), [8, 4])
    assert order.tolist() == [103, 104, 105, 106, 107, 109, 110, 111]
    assert sizes == [5, 3]


def test_larger_numbers_begin_where_told():
    assert spread(11, 4) == [3, 3, 3, 2]
    assert spread(11, 4, 2) == [3, 2, 3, 3]


# --- metrics --------------------------------------------------------------------------------------


def _outputs(name):
    rng = np.random.default_rng(0)
    if name in ("mae", "rmse", "r2"):
        return 1e4 + rng.random((50, 2)), 1e4 + rng.random((50, 2))
    return rng.random((50, 6)), rng.integers(0, 6, 50)


@pytest.mark.parametrize("name", [*METRICS, "top2"])
def test_a_metric_of_parts_is_that_of_the_set(name):
    """The second of four ranks has no batch."""
    y, t = _outputs(name)
    whole = METRICS.get(name, lambda: TopK(k=2))()
    whole.update(y, t)

    def work(communicator):
        metric, home = METRICS.get(name, lambda: TopK(k=2))(), linear_net().home
        parts = [[(0, 7), (7, 20)], [], [(20, 21)], [(21, 50)]][communicator.rank]
        for first, last in parts:
            metric.update(y[first:last], t[first:last])
        Ranks(communicator).join(metric, home)
        return metric.compute()

    for value in on_ranks(4, work):
        np.testing.assert_allclose(value, whole.compute(), rtol=1e-11)


def test_average_precision_of_parts():
    rng = np.random.default_rng(1)

    def image(count, scored):
        corners = rng.random((count, 2)) * 5
        found = {"boxes": np.hstack([corners, corners + 3]), "labels": rng.integers(0, 2, count)}
        return {**found, "scores": rng.random(count)} if scored else found

    y, t = ([image(n, scored) for n in (4, 0, 6, 5)] for scored in (True, False))
    whole = AveragePrecision()
    whole.update(y, t)

    def work(communicator):
        metric, rank = AveragePrecision(), communicator.rank
        metric.update(y[2 * rank : 2 * rank + 2], t[2 * rank : 2 * rank + 2])
        Ranks(communicator).join(metric, linear_net().home)
        return metric.compute()

    assert on_ranks(2, work) == [whole.compute()] * 2


class Own(Metric):
    def _take(self, y, t):
        pass

    def compute(self):
        return 0.0

    def reset(self):
        pass


# --- files, callbacks -----------------------------------------------------------------------------


class Seen(Callback):
    every_step = True

    def __init__(self):
        self.calls = []

    def on_train_begin(self, trainer):
        self.calls.append("begin")

    def on_step_end(self, trainer, loss):
        self.calls.append(loss)

    def on_epoch_end(self, trainer, figures):
        self.calls.append(figures["train_loss"])


class SeenOnFirst(Seen):
    every_rank = False


def test_callbacks_say_on_which_ranks_they_run(tmp_path, capfd):
    def work(communicator):
        log, best = tmp_path / f"{communicator.rank}.csv", tmp_path / f"{communicator.rank}.net"
        seen = [Seen(), SeenOnFirst()]
        callbacks = [*seen, CSVLogger(log), KeepBest(best), EMA(0.5)]
        trainer = train(communicator, callbacks=callbacks, verbose=True)
        return [each.calls for each in seen], callbacks[-1].updates, trainer.epoch

    first, second = on_ranks(2, work)
    assert first[0][0] == first[0][1] == second[0][0]
    assert second[0][1] == []
    assert first[1:] == second[1:] == (6, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.csv", "0.net"]
    assert capfd.readouterr().out.count("epoch 1:") == 1


def test_rank_0_writes_and_another_number_of_ranks_resumes(tmp_path):
    """In the middle of the second epoch, with the averages and early stopping's best weights."""
    options = {"epochs": 3, "early_stopping": 2, "seed": 7}
    whole = train(callbacks=EMA(0.9), **options)

    def begin(communicator):
        class Stopped(Trainer):
            def run_batch(self, *batch, **size):
                super().run_batch(*batch, **size)
                if self._history.count == 5 and communicator.rank == 1:
                    self.stop()

        trainer = make(
            communicator, kind=Stopped, callbacks=EMA(0.9), checkpoint_dir=tmp_path, **options
        )
        trainer.train()
        return trainer.epoch, trainer.batch, trainer.last_checkpoint

    found = on_ranks(2, begin)
    assert [each[:2] for each in found] == [(1, 2)] * 2
    assert found[0][2] == found[1][2]
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    header = load_tensors(found[0][2])[1]
    assert header["ranks"] == 2
    assert header["options"]["sync_batch_norm"] is False

    def resume(communicator):
        trainer = Trainer.resume(
            tmp_path, X, T, X[:5], T[:5], callbacks=EMA(0.9), distributed=communicator
        )
        trainer.train()
        return trainer

    for ranks in (3, 1):
        resumed = on_ranks(ranks, resume)
        for each in resumed:
            np.testing.assert_allclose(each.train_loss_list, whole.train_loss_list, rtol=1e-12)
            np.testing.assert_allclose(
                each.history["test_loss"], whole.history["test_loss"], rtol=1e-12
            )
            assert bits(each.model) == bits(resumed[0].model)


def test_checkpoints_of_before_have_no_option_of_ranks(tmp_path):
    path = make().checkpoint(tmp_path / "old.safetensors")

    def older(header):
        assert header["options"].pop("sync_batch_norm") is False
        assert header.pop("ranks") == 1

    rewrite(path, older)
    assert Trainer.resume(path, X, T, X[:5], T[:5]).sync_batch_norm is False


def test_rank_0_writes_the_checkpoint_that_is_asked_for(tmp_path):
    def work(communicator):
        path = tmp_path / f"{communicator.rank}.safetensors"
        assert make(communicator).checkpoint(path) == path

    on_ranks(2, work)
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


def test_a_checkpoint_that_rank_0_cannot_write_is_an_error_of_all(tmp_path, monkeypatch):
    def work(communicator):
        trainer = make(communicator, checkpoint_dir=tmp_path)

        def fail(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(trainer._saver, "save", lambda *a: fail())
        with pytest.raises(OSError, match="No space left"):  # on all, so that all can handle it
            trainer.train()
        return trainer.epoch, communicator.job.aborted

    assert on_ranks(2, work) == [(1, [])] * 2


def test_rank_0_makes_the_folder_of_checkpoints(tmp_path):
    """Of several hosts, only the first may have it."""
    (tmp_path / "file").touch()

    def work(communicator):
        folder = tmp_path / f"{communicator.rank}"
        assert make(communicator, checkpoint_dir=folder).checkpoint_dir == tmp_path / "0"
        resumed = tmp_path / "0" / "c.safetensors"
        make(communicator).checkpoint(resumed)
        communicator.barrier()
        data, other = (X, T, X[:5], T[:5]), tmp_path / f"r{communicator.rank}"
        again = Trainer.resume(resumed, *data, checkpoint_dir=other, distributed=communicator)
        assert again.checkpoint_dir == tmp_path / "r0"
        with pytest.raises(OSError, match="it is a file"):
            make(communicator, checkpoint_dir=tmp_path / "file" if folder.name == "0" else folder)

    on_ranks(2, work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "file", "r0"]


def test_a_run_that_another_trainer_trains_is_refused_on_all_ranks(tmp_path):
    def work(communicator):
        trainer = make(communicator, checkpoint_dir=tmp_path)
        with trainer._sole():
            other = make(communicator, checkpoint_dir=tmp_path)
            other.run = trainer.run
            with pytest.raises(CheckpointError, match="already being trained"):
                other.train()

    on_ranks(2, work)


# --- stops, errors --------------------------------------------------------------------------------


def test_a_nan_of_one_rank_stops_all_in_the_same_step():
    """The image is in the second batch of the first epoch."""
    place = int(make().order(0)[8 + 5])
    x = X.astype("float64")

    def work(communicator):
        trainer = make(communicator, x=x)
        images = trainer.x_train.copy()
        images[place] = np.nan
        trainer._feed.samples = copy.copy(trainer._sets.train)
        object.__setattr__(trainer._feed.samples, "images", images)
        with pytest.raises(NotFiniteError, match=r"step 2 \(epoch 1\)"):
            trainer.train()
        return bits(trainer.model)

    first, second = on_ranks(2, work)
    assert first == second


def test_an_error_of_one_rank_ends_the_job(capfd, monkeypatch):
    monkeypatch.setattr("portacnn.distributed.faults.sleep", lambda _: None)

    class Broken(Callback):
        def __init__(self, rank):
            self.rank = rank

        def on_epoch_end(self, trainer, figures):
            if self.rank == 1:
                raise ValueError("out of luck")

    jobs = []

    def work(communicator):
        jobs.append(communicator.job)
        train(communicator, callbacks=[Broken(communicator.rank)])

    with pytest.raises(ValueError, match="out of luck"):
        on_ranks(2, work)
    assert jobs[0].aborted[0] == 1
    assert "rank 1 of 2" in capfd.readouterr().err


def test_seeds_and_weights_are_those_of_rank_0():
    def work(communicator):
        rank = communicator.rank
        trainer = make(communicator, net=lambda: linear_net(seed=rank), seed=None)
        trainer.train()
        return trainer.seed, trainer.run, trainer.model.seed, bits(trainer.model)

    first, second = on_ranks(2, work)
    assert first == second
    assert first[2] == linear_net(seed=0).seed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 10}, "batch_size is 8 on rank 0, 10 on rank 1"),
        ({"t": np.roll(T, 1)}, "labels of the training set is"),
        ({"x": X[:19], "t": T[:19]}, r"training set is \[20, 1, 8, 8.*\[19, 1, 8, 8"),
        ({"net": lambda: linear_net("float32")}, "layer fc is .*float64"),
        ({"optimizer": "momentum"}, "optimizer is"),
        ({"callbacks": [EMA()]}, r"callbacks is \[\] on rank 0, \['EMA'\] on rank 1"),
    ],
)
def test_ranks_that_differ_say_so_at_the_start(changes, message):
    def work(communicator):
        with pytest.raises(ArgumentError, match=message):
            make(communicator, **(changes if communicator.rank else {}))

    on_ranks(2, work)


def norm_net():
    return Model(f=Flatten(), bn=BatchNorm1d(64), fc=Linear(64, 4)).build((1, 8, 8), device="numpy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 19}, "each of 2 processes needs an image.*last batch of 20.*would have 1;"),
        ({"batch_size": 5, "accumulate": 3}, r"would have 5, in parts of 2, 2, 1 .*or accumulate"),
        ({"batch_size": 18, "net": norm_net}, r"for each of 2 processes 1; .*sync_batch_norm"),
        ({"metrics": [Own()]}, "metric own .*pieces and put"),
    ],
)
def test_refusals(changes, message):
    def work(communicator):
        with pytest.raises(ArgumentError, match=message):
            make(communicator, **changes)

    on_ranks(2, work)
    if "net" in changes:
        on_ranks(2, lambda c: train(c, **changes, sync_batch_norm=True))


def test_batches_of_ones_own():
    def work(communicator):
        trainer = make(communicator)
        for size, batch in zip([8, 8, 4], trainer.read(0), strict=True):
            trainer.run_batch(*batch, size=size)
        trainer.run_batch(np.arange(4) + 4 * communicator.rank)
        with pytest.raises(
            ArgumentError, match=r"expected 4 images on rank . of 2 for a batch of 8"
        ):
            trainer.run_batch(np.arange(3), size=8)
        trainer._read_losses()
        return trainer.train_loss_list

    first, second = on_ranks(2, work)
    assert first == second
    alone = make()
    for batch in (*alone.read(0), (np.arange(8),)):
        alone.run_batch(*batch)
    alone._read_losses()
    np.testing.assert_allclose(first, alone.train_loss_list, rtol=1e-12)


def test_a_loss_whose_count_depends_on_values_must_be_an_array():
    from portacnn.losses import MSE

    class Odd(MSE):
        def count(self, t, weight=None, dtype="float32"):
            return 1 + int(t[0, 0])

    def work(communicator):
        with pytest.raises(StateError, match="return an array if it depends on the values"):
            train(communicator, loss=Odd(), t=T.astype("float64"), metrics=(), net=value_net)

    on_ranks(2, work)


def value_net():
    net = Model(flat=Flatten(), fc=Linear(64, 1))
    return net.build((1, 8, 8), device="numpy", dtype="float64")


def test_a_learning_rate_is_tried_and_copies_are_alone():
    def work(communicator):
        trainer = make(communicator)
        losses = lr_range_test(trainer, steps=5).losses
        again = pickle.loads(pickle.dumps(trainer))
        again.train()
        trainer.train()
        return losses, again.ranks.size, again.train_loss_list, trainer.train_loss_list

    first, second = on_ranks(2, work)
    assert first == second
    assert first[1] == 1
    np.testing.assert_allclose(first[2], first[3], rtol=1e-12)
    np.testing.assert_allclose(first[0], lr_range_test(make(), steps=5).losses, rtol=1e-12)


# --- data -----------------------------------------------------------------------------------------


class Counted:
    """Images and labels that are made when they are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.read.append(index)
        return X[index], T[index]


def test_a_part_of_a_set_is_read_later():
    source = Counted()
    samples = Samples(Rows(source), np.arange(20))
    source.read.clear()
    part = samples.part(3, 6)
    assert source.read == []
    assert part.targets.tolist() == [3, 4, 5]
    np.testing.assert_array_equal(part.images[:], X[3:6])
    assert samples.part(0, 20) is samples


@pytest.mark.parametrize("augment", [None, "mixup"])
def test_each_rank_reads_its_images_alone(augment):
    """In a step those of its share, and what comes along; then its third to evaluate."""
    options = {"augment": augment, "epochs": 1}
    alone = train(**options)

    def work(communicator):
        source, rank = Counted(), communicator.rank
        trainer = make(communicator, Dataset(source, T), None, **options)
        order, _ = trainer.updater.split.epoch(trainer.order(0), [8, 8, 4])
        source.read.clear()
        trainer.train()
        expected = [*order.tolist(), *range(*((0, 7), (7, 14), (14, 20))[rank])]
        return trainer.train_loss_list, source.read, expected

    for losses, read, expected in on_ranks(3, work):
        np.testing.assert_allclose(losses, alone.train_loss_list, rtol=1e-6)
        for index in expected:
            read.remove(index)
        assert read in ([], list(range(20)))  # the range of values, if the model gets to know it


def test_ranks_share_a_stream():
    def made(epoch):
        yield from ((X[i], T[i]) for i in range(20))

    def run(communicator):
        stream = Stream(made, 20)
        trainer = Trainer(
            linear_net(),
            stream,
            batch_size=8,
            epochs=1,
            augment="cutmix",
            verbose=False,
            distributed=communicator,
        )
        trainer.train()
        return trainer.train_loss_list

    alone = run(None)
    for losses in on_ranks(3, run):
        np.testing.assert_allclose(losses, alone, rtol=1e-12)


def test_ranks_look_for_nan_in_their_parts_of_a_map(tmp_path, monkeypatch):
    from portacnn.data import rows

    monkeypatch.setattr(rows, "_BLOCK", 4 * 64 * 4)  # five blocks of four images
    np.save(tmp_path / "x.npy", X.astype("float32"))
    images = rows.Rows(np.load(tmp_path / "x.npy", mmap_mode="r"))
    seen = []
    monkeypatch.setattr(rows.Rows, "_check", lambda self, x, numbers: seen.append(numbers[0]))
    for part in range(2):
        rows.Rows(images.source).check_finite(part, 2)
    assert seen == [0, 8, 16, 4, 12]


def test_what_a_communicator_is_told():
    with pytest.raises(ArgumentError, match="distributed must be one of"):
        make("many")
    assert make(None).ranks.alone
    assert isinstance(on_ranks(1, lambda c: make(c).ranks.communicator)[0], ThreadCommunicator)
