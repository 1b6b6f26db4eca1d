"""``Dataset``, what is read batch by batch, arrays from files, and results computed ahead."""

import logging
import threading
import time

import numpy as np
import pytest

from portacnn.data import Dataset, Rows, load
from portacnn.data.prefetch import in_order
from portacnn.errors import ArgumentError, DataFormatError, LabelError, NotFiniteError, ShapeError
from support.digits import write_digits


def images(count=12, shape=(2, 4, 3), dtype="uint8"):
    return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(dtype)


class Items:
    """An object with ``__len__`` and ``__getitem__``, as another library's data set is."""

    def __init__(self, array, labels=None, shape=None):
        self.array, self.labels, self.read = array, labels, []

    def __len__(self):
        return len(self.array)

    def __getitem__(self, index):
        assert type(index) is int
        self.read.append(index)
        if index == 7:
            raise OSError("the drive is gone")
        image = self.array[index]
        return image if self.labels is None else (image, self.labels[index])


def mapped(path, array):
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def kinds(tmp_path, array):
    """The same images as an array, a memory map, a map of channels-last images, one with the batch
    last, and an object."""
    last = mapped(tmp_path / "hwc.npy", array.transpose(0, 2, 3, 1))
    batch = mapped(tmp_path / "chwn.npy", np.ascontiguousarray(array.transpose(1, 2, 3, 0)))
    return {
        "array": array,
        "map": mapped(tmp_path / "nchw.npy", array),
        "HWC": last.transpose(0, 3, 1, 2),
        "batch last": batch.transpose(3, 0, 1, 2),
        "big-endian": mapped(tmp_path / "be.npy", array.astype(array.dtype.newbyteorder(">"))),
        "object": Items(array),
    }


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_every_kind_of_images(tmp_path, dtype):
    array, labels = images(6, dtype=dtype), np.arange(6)
    files = [f"{n}.png" for n in labels]
    for kind, source in kinds(tmp_path, array).items():
        data = Dataset(source, labels, files=files)
        assert (len(data), data.images.dtype.newbyteorder("=")) == (6, dtype), kind
        for key in (3, -1, slice(1, 5, 2), [5, 0, 0], np.array([2, 4]), np.arange(6) % 2 == 0):
            x, t = data[key]
            assert np.asarray(x).tolist() == array[key].tolist(), kind
            assert np.asarray(t).tolist() == labels[key].tolist(), kind
        x, _ = data[[4, 1]]
        assert x.flags.c_contiguous
        assert x.dtype.isnative
        part = data.subset([5, 3, 1]).subset([2, 0])
        assert (part.labels.tolist(), part.files) == ([1, 5], ("1.png", "5.png"))
        assert np.asarray(part[:][0]).tolist() == array[[1, 5]].tolist(), kind
        assert part.images.shape == (2, 2, 4, 3)
        assert isinstance(part.images, Rows) == (kind != "array"), kind


def test_a_subset_reads_nothing_until_it_must():
    items = Items(images(20))
    train, test = Dataset(items, np.arange(20) % 2).split(0.2)
    assert items.read == [0]  # the shape
    test[:]
    assert len(items.read) == 5
    assert sorted({*train.labels.tolist()}) == [0, 1]


def test_pairs_have_their_labels():
    array, labels = images(5), [4, 3, 2, 1, 0]
    data = Dataset(Items(array, labels))
    assert data.labels.tolist() == labels
    assert data[2][0].tolist() == array[2].tolist()
    with pytest.raises(ArgumentError, match="expected a pair"):
        Dataset(Items(array))
    with pytest.raises(ArgumentError, match="labels are missing"):
        Dataset(array)


def test_pillows_images_have_their_channels_first():
    image = pytest.importorskip("PIL.Image")
    array = images(3, (5, 4, 3))
    data = Dataset([(image.fromarray(each), 1) for each in array])
    assert data[:][0].tolist() == array.transpose(0, 3, 1, 2).tolist()
    grey = Dataset([image.fromarray(each[..., 0]) for each in array], [0, 1, 2])
    assert grey.images.shape == (3, 1, 5, 4)


def test_errors_name_the_image():
    array = images(9)
    data = Dataset(Items(array), np.zeros(9, int), files=[f"photo {n}.jpg" for n in range(9)])
    with pytest.raises(OSError, match="the drive is gone") as raised:
        data[[0, 7]]
    assert "photo 7.jpg" in raised.value.__notes__[0]
    ragged = [np.zeros((1, 2, 2)), np.zeros((1, 2, 3))]
    with pytest.raises(ShapeError, match=r"image 1: expected .* \(1, 2, 2\)"):
        Dataset(ragged, [0, 1])[:]
    with pytest.raises(DataFormatError, match="expected an image of numbers, got str"):
        Dataset(["a.png"], [0])
    with pytest.raises(ArgumentError, match="expected at least one image"):
        Dataset([], [])
    with pytest.raises(ArgumentError, match="Stream takes generators"):
        Dataset(iter(array), [0])
    with pytest.raises(LabelError, match="a label for each of 9 images, got shape"):
        Dataset(array, [0, 1])
    with pytest.raises(LabelError, match=r"label 2 has no name: there are 2"):
        Dataset(array, np.arange(9) % 3, ["cat", "dog"])
    with pytest.raises(ArgumentError, match="expected 9 files"):
        Dataset(array, np.zeros(9, int), files=["a"])
    for wrong in ([9], [-1], [0.5], [[0]]):
        with pytest.raises(ArgumentError, match="indices must"):
            Dataset(array, np.zeros(9, int)).subset(wrong)


def test_nan_is_looked_for_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("portacnn.data.rows._BLOCK", 2 * 24 * 8)  # two images
    array = images(7, dtype="float64")
    sizes = []
    rows = Rows(mapped(tmp_path / "fine.npy", array))
    read = rows.read
    rows.read = lambda indices: sizes.append(len(indices)) or read(indices)
    rows.check_finite()
    assert sizes == [2, 2, 2, 1]
    array[5, 1, 0, 0] = np.nan
    named = Rows(mapped(tmp_path / "nan.npy", array), [*"acdef", "b.png", "g"])
    with pytest.raises(NotFiniteError, match=r"^b\.png contains NaN"):
        named.check_finite()
    array[5, 1, 0, 0] = 1e300
    mapped(tmp_path / "large.npy", array)
    large = Rows(np.load(tmp_path / "large.npy", mmap_mode="r"))
    large.check_finite()
    with pytest.raises(NotFiniteError, match=r"image 5 contains .* beyond the range of float32"):
        large.cast("float32").check_finite()


# --- split ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.5])
def test_a_split_is_stratified_and_by_seed(share):
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 5, 9], [40, 13, 6, 1]))
    data = Dataset(np.arange(60, dtype="float32").reshape(60, 1, 1, 1), labels)
    train, test = data.split(share, seed=3)
    assert len(test) == round(share * 60)
    both = [int(x) for part in (train, test) for x in part.images.ravel()]
    assert sorted(both) == list(range(60))
    assert train.images.ravel().tolist() == sorted(train.images.ravel().tolist())
    for label, count in zip([0, 1, 5, 9], [40, 13, 6, 1], strict=True):
        own = int((test.labels == label).sum())
        assert abs(own - share * count) <= 1
        assert own < count  # a class with one image stays in the training set
    assert data.split(share, seed=3)[1].images.tolist() == test.images.tolist()
    assert data.split(share, seed=4)[1].images.tolist() != test.images.tolist()


def test_a_split_of_other_targets_and_of_too_few():
    data = Dataset(np.zeros((10, 1, 2, 2)), np.linspace(0, 1, 10))
    train, test = data.split(0.3)
    assert (len(train), len(test)) == (7, 3)
    with pytest.raises(ArgumentError, match="both need at least one"):
        data.split(0.01)
    with pytest.raises(ArgumentError, match="share"):
        data.split(1.0)


# --- arrays from files ----------------------------------------------------------------------------


def test_npz(tmp_path):
    array, labels = images(20, (5, 4, 3)), np.arange(20) % 4
    path = tmp_path / "set.npz"
    np.savez(
        path, X_train=array, y_train=labels[:, None], x_test=array[:6], y_test=labels[:6, None]
    )
    train, test = load(path)
    assert train.images.tolist() == array.transpose(0, 3, 1, 2).tolist()
    assert train.labels.tolist() == labels.tolist()
    assert len(test) == 6
    np.savez_compressed(path, images=array[..., 0], labels=labels, class_names=list("abcd"))
    train, test = load(path, test_share=0.4)
    assert (train.images.shape, len(test)) == ((12, 1, 5, 4), 8)
    assert train.class_names == test.class_names == tuple("abcd")
    assert np.bincount(test.labels).tolist() == [2, 2, 2, 2]


def test_a_folder_of_npy_files_is_mapped(tmp_path):
    array, labels = images(20, (3, 5, 4)), np.arange(20) % 4
    for name, each in {"x_train": array, "t_train": labels, "notes": labels}.items():
        np.save(tmp_path / f"{name}.npy", each)
    train, test = load(tmp_path)
    assert isinstance(train.images, Rows)
    assert isinstance(train.images.source, np.memmap)
    both = np.concatenate([train[:][0], test[:][0]])
    assert sorted(both.reshape(20, -1).tolist()) == sorted(array.reshape(20, -1).tolist())


def test_labels_with_gaps_are_told(tmp_path, caplog):
    np.savez(tmp_path / "gaps.npz", x=images(12), y=np.repeat([0, 2, 5], 4))
    with caplog.at_level(logging.WARNING):
        train, _ = load(tmp_path / "gaps.npz")
    assert "labels go to 5, but 3 of them have no training image (1, 3, 4)" in caplog.text
    assert sorted(set(train.labels.tolist())) == [0, 2, 5]


def test_files_that_are_no_data_set(tmp_path):
    def says(name, text, kind=DataFormatError):
        with pytest.raises(kind, match=text):
            load(tmp_path / name)

    says("nowhere", "there is no file or folder .*; the data sets known", FileNotFoundError)
    (tmp_path / "a.npz").write_bytes(b"PK\3\4 cut short")
    says("a.npz", r"a\.npz: expected an \.npz file of arrays")
    np.savez(tmp_path / "objects.npz", x=np.array([{}, []], dtype=object), y=np.arange(2))
    says("objects.npz", r"expected an \.npz file of arrays of numbers")
    np.savez(tmp_path / "names.npz", pictures=images(3), y=np.arange(3))
    says("names.npz", "expected the arrays x_train.*it has pictures, y")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "folder" / "x_train.npy", images(3))
    says("folder", "expected the arrays x_train")
    np.save(tmp_path / "folder" / "t_train.npy", np.arange(3))
    content = (tmp_path / "folder" / "x_train.npy").read_bytes()
    (tmp_path / "folder" / "x_train.npy").write_bytes(content[:-1])
    says("folder", r"x_train\.npy: expected an \.npy file")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    says("notes.csv", "looks like a CSV table")
    (tmp_path / "empty").mkdir()
    says("empty", "expected a folder of images for each class.*the folder holds: nothing")


def test_a_folder_of_idx_files_and_what_does_not_apply(tmp_path):
    folder = write_digits(tmp_path / "digits")
    train, test = load(folder)
    assert (train.images.shape, len(test)) == ((40, 1, 12, 12), 15)
    assert load(folder, image_size=12, mode="L")[0].images.shape == train.images.shape
    with pytest.raises(ArgumentError, match="image_size=64 is for folders of images"):
        load(folder, image_size=64)
    with pytest.raises(ArgumentError, match='mode="RGB" is for folders of images'):
        load(folder, mode="RGB")
    train, test = load("mnist-sample")
    assert (len(train), len(test), train.class_names[9]) == (4000, 1000, "9")


# --- prefetch -------------------------------------------------------------------------------------


def test_results_come_in_order_from_a_bounded_queue():
    started, lock = [], threading.Lock()

    def work(number):
        with lock:
            started.append(number)
        time.sleep(0.002 * (number % 3))
        return number * number

    taken = []
    for number, result in enumerate(in_order(work, range(30), threads=3, ahead=4)):
        taken.append(result)
        with lock:
            assert len(started) <= number + 1 + 4 + 1
    assert taken == [n * n for n in range(30)]


def workers():
    return [t for t in threading.enumerate() if t.name.startswith("portacnn-data")]


def test_an_error_is_raised_at_its_turn_and_the_threads_end():
    def work(number):
        if number == 5:
            raise KeyError("photo 5.jpg")
        return number

    made = in_order(work, range(10**9), threads=2, ahead=3)
    assert [next(made) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(KeyError, match=r"photo 5\.jpg"):
        next(made)
    assert not workers()


def test_a_loop_that_is_left_ends_the_threads():
    made = in_order(lambda n: n, range(10**9), threads=2, ahead=3)
    assert next(made) == 0
    made.close()
    assert not workers()
