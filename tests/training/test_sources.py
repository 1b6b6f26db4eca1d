"""Images that are read batch by batch: data sets, memory maps, objects and streams train as arrays
do, to the last bit."""

import threading
import tracemalloc

import numpy as np
import pytest

from portacnn import Normalize, Trainer, seeds
from portacnn.data import Dataset, Rows, Stream
from portacnn.errors import ArgumentError, DataFormatError, LabelError, NotFiniteError, ShapeError
from portacnn.training.feed import Resident
from support.matrix import EACH_LIBRARY
from support.nets import as_bytes, bits, patches, small_net

OPTIONS = {"epochs": 2, "batch_size": 20, "lr": 0.01, "verbose": False}


class Items:
    """An object with ``__len__`` and ``__getitem__``; ``bad`` is an item that cannot be read."""

    def __init__(self, images, labels=None, bad=None):
        self.images, self.labels, self.bad = images, labels, bad

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.bad:
            raise OSError("the drive is gone")
        image = self.images[index]
        return image if self.labels is None else (image, self.labels[index])


def pairs(x, t):
    return zip(x, t, strict=False)


def net(device="numpy"):
    model = small_net(device)
    model.preprocess = Normalize(mean=0.2, std=0.5)
    return model


def mapped(folder, array, axes=(0, 1, 2, 3)):
    """A memory map of images that lie on the disk with their axes in this order."""
    path = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(path, np.ascontiguousarray(array.transpose(axes)))
    return np.load(path, mmap_mode="r").transpose(np.argsort(axes))


def sources(folder, x, t):
    """The same training set, each in its way: x_train and t_train."""
    order = np.random.default_rng(5).permutation(len(x))
    back = np.argsort(order)
    return {
        "map": (mapped(folder, x), t),
        "HWC": (mapped(folder, x, (0, 2, 3, 1)), t),
        "batch last": (mapped(folder, x, (1, 2, 3, 0)), t),
        "object": (Items(x), t),
        "pairs": (Items(x, t.tolist()), None),
        "data set": (Dataset(x, t), None),
        "of a map": (Dataset(mapped(folder, x), t), None),
        "subset": (Dataset(mapped(folder, x[order]), t[order]).subset(back), None),
        "subset of an object": (Dataset(Items(x[order]), t[order]).subset(back), None),
    }


@EACH_LIBRARY
@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_they_train_as_arrays_do(backend, tmp_path, dtype):
    x, t = patches(50)
    x_test, t_test = patches(20, seed=1)
    x, x_test = (as_bytes(a) if dtype == "uint8" else a.astype(dtype) for a in (x, x_test))
    plain = Trainer(net(backend.device), x, t, x_test, t_test, **OPTIONS)
    plain.train()
    test = mapped(tmp_path, x_test, (0, 2, 3, 1))
    every = sources(tmp_path, x, t)
    few = every if backend.name == "numpy" else ["batch last", "pairs", "subset"]
    for name in few:
        x_train, t_train = every[name]
        run = Trainer(net(backend.device), x_train, t_train, test, t_test, **OPTIONS)
        run.train()
        assert run.train_loss_list == plain.train_loss_list, name
        assert run.train_acc_list == plain.train_acc_list, name
        assert run.test_loss_list == plain.test_loss_list, name
        assert bits(run.model) == bits(plain.model), name
        assert run.fingerprints() == plain.fingerprints(), name


def test_what_can_be_used_as_it_is_is_not_streamed(tmp_path):
    x, t = patches(50)
    for images in (as_bytes(x), x):
        assert isinstance(Trainer(net(), mapped(tmp_path, images), t, **OPTIONS)._feed, Resident)
    run = Trainer(net(), mapped(tmp_path, x.astype("float64")), t, **OPTIONS)
    assert isinstance(run.x_train, Rows)
    run = Trainer(net(), mapped(tmp_path, as_bytes(x), (1, 2, 3, 0)), t, **OPTIONS)
    assert isinstance(run.x_train, Rows)


def test_a_large_map_is_never_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("portacnn.data.rows._BLOCK", 1 << 17)
    count = 6000
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", "float64", (count, 8, 8, 1))
    labels = np.arange(count) % 4
    x[:] = np.random.default_rng(0).random((count, 8, 8, 1))
    x.flush()
    images = np.load(tmp_path / "x.npy", mmap_mode="r").transpose(0, 3, 1, 2)
    options = {**OPTIONS, "epochs": 1, "evaluate_sample_num_per_epoch": 100, "batch_size": 100}
    train, test = Dataset(images, labels).split(0.1)
    Trainer(net(), train.subset(range(100)), **options).train()  # what a step takes
    tracemalloc.start()
    try:
        Trainer(net(), train, None, test, None, **options).train()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < images.nbytes // 4


@EACH_LIBRARY
def test_predictions_of_rows(backend, tmp_path):
    x, t = patches(300)
    model = net(backend.device)
    for images in (as_bytes(x), x):
        rows = Rows(mapped(tmp_path, images, (1, 2, 3, 0)))
        expected = backend.host(model.predict(images))
        assert backend.host(model.predict(rows)).tolist() == expected.tolist()
        assert model.accuracy(rows, t) == model.accuracy(images, t)
        assert model.evaluate(rows, t) == model.evaluate(images, t)
        assert backend.host(model.predict(rows, 7)).shape == (300, 4)
        first = backend.host(model.predict(rows.subset([5])))
        assert first.tolist() == backend.host(model.predict(images[5:6])).tolist()
    with pytest.raises(ShapeError, match="expected images"):
        model.predict(Rows(np.zeros((3, 2, 8, 8), "float32")))


def test_resuming_within_an_epoch(tmp_path):
    x, t = patches(50)
    (tmp_path / "maps").mkdir()
    for name, (x_train, t_train) in sources(tmp_path / "maps", as_bytes(x), t).items():
        whole = Trainer(net(), x_train, t_train, **OPTIONS)
        whole.train()
        folder = tmp_path / name
        Trainer(
            net(), x_train, t_train, checkpoint_dir=folder, checkpoint_every=1, keep=9, **OPTIONS
        ).train()
        second = sorted(folder.iterdir())[0]
        rest = Trainer.resume(second, x_train, t_train, verbose=False)
        assert 0 < rest.steps_done < 6
        changed = Dataset(as_bytes(patches(50, seed=9)[0]), t)
        with pytest.raises(ArgumentError, match="the data differ"):
            Trainer.resume(second, changed)
        rest.train()
        assert bits(rest.model) == bits(whole.model), name


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("portacnn-data")]


def test_an_error_in_a_thread_is_raised_by_train():
    x, t = patches(50)
    files = [f"photo {n}.jpg" for n in range(50)]
    run = Trainer(net(), Dataset(Items(x, bad=33), t, files=files), **OPTIONS)
    with pytest.raises(OSError, match="the drive is gone") as raised:
        run.train()
    assert "photo 33.jpg" in raised.value.__notes__[0]
    assert not workers()
    x[17, 0, 3, 3] = np.nan
    run = Trainer(net(), Dataset(Items(x), t, files=files), **OPTIONS)
    with pytest.raises(NotFiniteError, match=r"photo 17\.jpg contains NaN"):
        run.train()
    assert not workers()


def test_a_map_with_nan_is_refused_at_once(tmp_path):
    x, t = patches(50)
    x[17, 0, 3, 3] = np.inf
    for dtype in ("float32", "float64"):
        with pytest.raises(NotFiniteError, match=r"^x_train"):
            Trainer(net(), mapped(tmp_path, x.astype(dtype)), t, **OPTIONS)
    x[17, 0, 3, 3] = 0
    x = x.astype("float64")
    x[3] = 1e200
    with pytest.raises(NotFiniteError, match=r"x_train: image 3 .*beyond the range of float32"):
        Trainer(net(), mapped(tmp_path, x), t, **OPTIONS)


def test_options_that_look_at_the_set(tmp_path):
    x, t = patches(60)
    t = np.minimum(t, 2)
    for options in (
        {"validation_split": 0.25},
        {"class_weight": "balanced"},
        {"sample_weight": np.arange(60.0)},
        {"drop_last": True, "batch_size": 25},
        {"accumulate": 3},
    ):
        plain = Trainer(net(), x, t, **{**OPTIONS, **options})
        run = Trainer(net(), Dataset(Items(x.astype("float64")), t), **{**OPTIONS, **options})
        for each in (plain, run):
            each.train()
        assert bits(run.model) == bits(plain.model), options
        assert run.test_acc_list == plain.test_acc_list
        assert isinstance(run.x_train, Rows)


def test_names_of_classes_go_to_the_model():
    x, t = patches(50)
    names = ("north", "east", "south", "west")
    for train in (Dataset(x, t, names), Stream(lambda _: pairs(x, t), 50, class_names=names)):
        run = Trainer(net(), train, **OPTIONS)
        run.train()
        assert run.model.info.class_names == names
    run = Trainer(net(), Dataset(x, np.minimum(t, 1), names[:2]), **OPTIONS)
    run.train()
    assert run.model.info.class_names == ()  # the network has four outputs


def test_what_is_refused():
    x, t = patches(50)
    data, stream = Dataset(x, t), Stream(lambda _: pairs(x, t), 50)
    for arguments, says in (
        ((data, t), "x_train is a Dataset, which has its labels; leave t_train out"),
        ((x, t, data, t), "x_test is a Dataset"),
        ((x, t, stream), "x_test is a Stream, which is for training only"),
        ((stream, t), "not taken with t_train"),
        ((Items(x),), "expected a pair"),
    ):
        with pytest.raises(ArgumentError, match=says):
            Trainer(net(), *arguments, **OPTIONS)
    for name, value in (
        ("validation_split", 0.2),
        ("sample_weight", t),
        ("class_weight", "balanced"),
    ):
        with pytest.raises(ArgumentError, match=name):
            Trainer(net(), stream, **OPTIONS, **{name: value})


# --- streams --------------------------------------------------------------------------------------


def shuffled(x, t, epochs, batch=None):
    """A stream of the samples in the order of a Trainer of seed 0."""

    def make(epoch):
        epochs.append(epoch)
        order = seeds.permutation(0, epoch, len(x))
        if batch is None:
            yield from zip(x[order], t[order], strict=True)
        else:
            for first in range(0, len(x), batch):
                yield x[order[first : first + batch]], t[order[first : first + batch]]

    return make


@EACH_LIBRARY
@pytest.mark.parametrize("batch", [None, 7, 1000])
def test_a_stream_trains_as_its_samples_do(backend, tmp_path, batch):
    if backend.name != "numpy" and batch != 7:
        return
    options = {"drop_last": True} if batch == 7 else {}
    x, t = patches(50, dtype="float64")
    epochs, options = [], {**OPTIONS, **options}
    plain = Trainer(net(backend.device), x, t, **options)
    plain.train()
    stream = Stream(shuffled(x, t, epochs, batch), 50)
    run = Trainer(
        *(net(backend.device), stream, None, x, t),
        **{**options, "checkpoint_dir": tmp_path, "checkpoint_every": 1, "keep": 9},
    )
    run.train()
    assert run.train_loss_list == plain.train_loss_list
    assert bits(run.model) == bits(plain.model)
    assert epochs == [0, 0, 1]
    first = sorted(tmp_path.iterdir())[0]
    rest = Trainer.resume(first, stream, None, x, t, verbose=False)
    assert rest.steps_done == 1
    rest.train()
    assert bits(rest.model) == bits(plain.model)
    # the figures of the training set are those of epoch 0's first samples
    order = seeds.permutation(0, 0, 50)
    assert run.train_acc_list[-1] == run.model.accuracy(x[order], t[order])


def test_streams_that_are_wrong():
    x, t = patches(50)

    def train(make, count=50, evaluated=5):
        Trainer(net(), Stream(make, count, evaluated=evaluated), **OPTIONS).train()

    with pytest.raises(DataFormatError, match="epoch 0 ended after 50 of 60 samples"):
        train(lambda _: pairs(x, t), 60)
    once = [pairs(x[:5], t), pairs(x, t), iter(())]
    with pytest.raises(DataFormatError, match="epoch 1 ended after 0 of 50 samples"):
        train(lambda _: once.pop(0))
    with pytest.raises(DataFormatError, match=r"pairs \(image, label\)"):
        train(lambda _: iter(x))
    with pytest.raises(LabelError, match="label 4"):
        train(lambda _: pairs(x, [*t[:30], *[4] * 20]))
    with pytest.raises(NotFiniteError, match="contains NaN"):
        train(lambda _: pairs([*x[:30], *[x[0] * np.nan] * 20], t))
    with pytest.raises(ShapeError, match=r"like the first, got"):
        train(lambda _: pairs([*x[:20], *[np.zeros((1, 9, 9))] * 30], t))
    with pytest.raises(ZeroDivisionError):
        train(lambda _: ((image, 0 // (30 - n)) for n, image in enumerate(x)), evaluated=1)
    with pytest.raises(ArgumentError, match="a generator itself ends after one epoch"):
        Stream(pairs(x, t), 50)
    assert not workers()


def test_a_generator_that_goes_on_is_closed():
    x, t = patches(50)
    ended = []

    def make(epoch):
        try:
            while True:
                yield from pairs(x, t)
        finally:
            ended.append(epoch)

    Trainer(net(), Stream(make, 30), **OPTIONS).train()
    assert ended == [0, 0, 1]
