"""Folders of images: which files, which pixels, the cache, and what may be wrong with a photo."""

import errno
import logging
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from portacnn import Normalize, Trainer
from portacnn.data import ImageFolder, image_cache, image_folder, load
from portacnn.data.decoding import decode
from portacnn.errors import ArgumentError, DataFormatError, DependencyError
from portacnn.models import ResNet20
from support.shapes import write_shapes

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PORTACNN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def pixels(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype="uint8")


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    made = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    made.save(path, **options)
    return path


def two_classes(root, **more):
    """A folder with two classes of two images each, and more files by name."""
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        save(root / name, pixels(9, 9, seed=len(name)))
    for name, content in more.items():
        (root / name).write_bytes(content)
    return root


def decoded(path, size=8, mode="RGB"):
    size = (size, size) if isinstance(size, int) else size
    return decode(path, str(path), size, mode, 1 << 26)


# --- the rule: which pixels -----------------------------------------------------------------------


def resized_in_loops(image, h, w):
    """Bilinear, averaging where it shrinks: a triangle as wide as one pixel of the result."""

    def along(rows, count):
        scale = len(rows) / count
        wide = max(scale, 1.0)
        made = []
        for at in range(count):
            centre = (at + 0.5) * scale
            weights = [max(0.0, 1 - abs(i + 0.5 - centre) / wide) for i in range(len(rows))]
            made.append(np.tensordot(weights, rows, 1) / sum(weights))
        return np.stack(made)

    columns = along(np.moveaxis(image.astype("float64"), 1, 0), w)
    return along(np.moveaxis(columns, 0, 1), h)


@pytest.mark.parametrize(
    ("h", "w", "size", "new_h", "new_w", "top", "left"),
    [
        (21, 14, 8, 12, 8, 2, 0),
        (14, 21, 8, 8, 12, 0, 2),
        (10, 17, 8, 8, 13, 0, 2),  # 8 * 17 / 10 = 13.6; (13 - 8) / 2 = 2.5, to the even
        (19, 10, 8, 15, 8, 4, 0),  # 15.2; 3.5, to the even
        (5, 6, 8, 8, 9, 0, 0),  # smaller than the result; 0.5
        (8, 8, 8, 8, 8, 0, 0),
        (14, 14, (6, 9), 9, 9, 2, 0),  # 1.5, to the even
        (10, 30, (6, 9), 6, 18, 0, 4),  # 4.5
        (6, 9, (6, 9), 6, 9, 0, 0),
    ],
)
def test_short_side_is_resized_and_the_centre_cropped(
    tmp_path, h, w, size, new_h, new_w, top, left
):
    image = pixels(h, w)
    got = decoded(save(tmp_path / "a.png", image), size)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    expected = resized_in_loops(image, new_h, new_w)[top : top + rows, left : left + columns]
    assert got.shape == (3, rows, columns)
    assert got.dtype == np.uint8
    assert got.flags.c_contiguous
    assert np.abs(got.transpose(1, 2, 0) - expected).max() <= 1.01  # rounded twice


def flat(mode, value, size=(6, 6)):
    return Image.new(mode, size, value)


HALF = (255, 0, 0, 128)
OVER_WHITE = (255, 127, 127)


def palette(transparent):
    image = flat("P", 1)
    image.putpalette([0, 0, 255, *RED])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


@pytest.mark.parametrize(
    ("image", "end", "rgb"),
    [
        (flat("L", 77), "png", (77,) * 3),
        (flat("1", 1), "png", WHITE),
        (flat("RGBA", HALF), "png", OVER_WHITE),
        (flat("RGBA", (9, 9, 9, 0)), "webp", WHITE),
        (flat("LA", (0, 0)), "png", WHITE),
        (palette(None), "png", RED),
        (palette(1), "png", WHITE),  # the colour that stands for nothing
        (palette(0), "png", RED),
        (palette(bytes([255, 128])), "png", OVER_WHITE),
        (flat("CMYK", (0, 255, 255, 0)), "tif", RED),
        (flat("CMYK", (0, 255, 255, 0)), "jpg", None),
        (Image.fromarray(np.full((6, 6), 0xAB12, "uint16")), "png", (0xAB,) * 3),
        (Image.fromarray(np.full((6, 6), 0xAB12, "uint16")), "tif", (0xAB,) * 3),
        (flat("RGB", GREEN), "bmp", GREEN),
        (flat("RGB", GREEN), "gif", GREEN),
        (flat("RGB", GREEN), "ppm", GREEN),
    ],
    ids=lambda value: getattr(value, "mode", None),
)
def test_modes_become_rgb_by_the_stated_rule(tmp_path, image, end, rgb):
    path = save(tmp_path / f"a.{end}", image)
    got = decoded(path)[:, 2, 2]
    if rgb is None:  # lossy: red all the same
        assert np.abs(got.astype(int) - RED).max() < 10
    else:
        assert got.tolist() == list(rgb)


def test_a_grey_result(tmp_path):
    path = save(tmp_path / "a.png", flat("RGB", (10, 100, 200)))
    assert decoded(path, mode="L").tolist() == np.full((1, 8, 8), 84).tolist()  # .299, .587, .114


def test_a_transparent_rgb_png(tmp_path):
    path = save(tmp_path / "a.png", flat("RGB", GREEN), transparency=GREEN)
    assert decoded(path)[:, 0, 0].tolist() == list(WHITE)


@pytest.mark.parametrize("turn", range(1, 9))
def test_rotation_noted_by_the_camera_is_applied(tmp_path, turn):
    """The upright image has red in its upper left quarter and green in the upper right one."""
    upright = np.zeros((8, 8, 3), "uint8")
    upright[:4, :4], upright[:4, 4:] = RED, GREEN
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[turn]
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / "a.png", stored, exif=exif)
    assert decoded(path).transpose(1, 2, 0).tolist() == upright.tolist()


def test_floating_point_and_32_bit_images_are_refused(tmp_path):
    for image in (flat("F", 0.5), flat("I", 1 << 20)):
        with pytest.raises(DataFormatError, match=r"a\.tif: the pixels"):
            decoded(save(tmp_path / "a.tif", image))


# --- broken and hostile files ---------------------------------------------------------------------


def claiming(width, height):
    """A PNG of a few bytes that claims to be this large."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(64)))


def truncated(tmp_path):
    content = save(tmp_path / "whole.jpg", pixels(64, 64)).read_bytes()
    return content[: len(content) // 2]


BAD = {
    "truncated": (truncated, "truncated"),
    "empty": (lambda _: b"", "cannot be decoded"),
    "text": (lambda _: b"<html>not found</html>", "cannot be decoded"),
    "bomb": (lambda _: claiming(9000, 9000), "9000 x 9000 pixels, more than max_pixels=67108864"),
    "greater bomb": (lambda _: claiming(50_000, 50_000), "has more than max_pixels=67108864 (Ima"),
    "long": (lambda _: claiming(1, 1 << 25), "too long for its width"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_cannot_be_decoded_is_named_or_left_out(tmp_path, cache, bad, caplog):
    make, says = BAD[bad]
    root = two_classes(tmp_path / "pets", **{"dog/0 bad.jpg": make(tmp_path)})
    with pytest.raises(DataFormatError) as raised:
        ImageFolder(root, 8)
    assert str(root / "dog" / "0 bad.jpg") in str(raised.value)
    assert says in str(raised.value)
    assert not list(cache.iterdir())  # nothing half-written
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # the second time from the cache
            left = ImageFolder(root, 8, on_error="skip")
            assert left.files == ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
            assert left.labels.tolist() == [0, 0, 1, 1]
            assert left.images[2].tolist() == decoded(root / "dog/1.png").tolist()
    assert caplog.text.count("1 of 5 images could not be decoded and were left out") == 2
    assert "dog/0 bad.jpg" in caplog.text
    memory = ImageFolder(root, 8, on_error="skip", cache=False)
    assert memory.images.tolist() == left.images.tolist()
    with pytest.raises(DataFormatError):  # the cache does not hide the error
        ImageFolder(root, 8)


def test_a_class_whose_images_are_all_left_out(tmp_path):
    root = two_classes(tmp_path / "pets")
    for path in (root / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataFormatError, match="no image of the classes dog could be decoded"):
        ImageFolder(root, 8, on_error="skip")


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(DependencyError, match=r'pip install "portacnn\[data\]"'):
        ImageFolder(two_classes_of_bytes(tmp_path), 8)


def two_classes_of_bytes(root):
    for name in ("cat", "dog"):
        (root / name).mkdir()
        (root / name / "1.png").write_bytes(b"")
    return root


# --- which files, which labels --------------------------------------------------------------------


def test_files_and_labels_by_name(tmp_path):
    root = tmp_path / 'my "photos" of 2026'
    names = [
        "1/a.png",
        "10/a.png",
        "2/B.PNG",
        "2/a.jpeg",
        "2/deeper/c.png",
        'it\'s a "cat"/ü ñ 猫.png',
        "ünï/x y.png",
    ]
    for name in reversed(names):
        save(root / name, flat("RGB", (len(name), 0, 0)))
    for other in (".hidden/a.png", "2/.a.png", "__MACOSX/._a.png", "2/notes.txt", "2/Thumbs.db"):
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).write_bytes(b"no image")
    save(root / "beside.png", pixels(3, 3))
    data = ImageFolder(root, 4)
    assert data.files == tuple(names)
    assert data.class_names == ("1", "10", "2", 'it\'s a "cat"', "ünï")
    assert data.labels.tolist() == [0, 1, 2, 2, 2, 3, 4]
    lossless = [number for number, name in enumerate(names) if not name.endswith("jpeg")]
    assert data.images[lossless, 0, 0, 0].tolist() == [len(names[number]) for number in lossless]


def test_links_are_followed_each_folder_once(tmp_path):
    root = two_classes(tmp_path / "pets")
    save(tmp_path / "elsewhere" / "3.png", pixels(4, 4))
    (root / "fox").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "4.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    (root / "dog" / "again").symlink_to(root / "dog")
    data = ImageFolder(root, 4)
    assert data.files == (
        *("cat/1.png", "cat/2.png", "cat/4.png"),
        *("dog/1.png", "dog/2.png", "fox/3.png"),
    )
    (root / "cat" / "5.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataFormatError, match=r"cat/5\.png"):
        ImageFolder(root, 4)


def test_folders_that_are_no_data_set(tmp_path):
    def says(root, text, kind=DataFormatError):
        with pytest.raises(kind, match=text):
            ImageFolder(root, 8)

    says(tmp_path / "none", "there is no folder", FileNotFoundError)
    save(tmp_path / "one" / "cat" / "1.png", pixels(4, 4))
    says(tmp_path / "one", "at least two classes; found one folder, 'cat'")
    save(tmp_path / "flat" / "1.png", pixels(4, 4))
    says(tmp_path / "flat", "found none, and 1 images outside of folders")
    says(tmp_path / "flat" / "1.png", "is a file; unpack it", NotADirectoryError)
    root = two_classes(tmp_path / "pets")
    (root / "fox").mkdir()
    (root / "fox" / "notes.txt").write_text("later")
    says(root, "class folders fox have no images")
    two_classes(tmp_path / "both" / "train")
    two_classes(tmp_path / "both" / "val")
    says(tmp_path / "both", "ImageFolder.train_and_test", ArgumentError)
    two_classes(tmp_path / "odd")
    (tmp_path / "odd" / "a\nb").mkdir()
    says(tmp_path / "odd", "rename the folder")


@pytest.mark.parametrize("test", ["val", "test", "Validation"])
def test_train_and_test_folders(tmp_path, test):
    two_classes(tmp_path / "train")
    save(tmp_path / test / "dog" / "7.png", pixels(5, 5))  # cats are missing: dogs stay class 1
    train, held_out = ImageFolder.train_and_test(tmp_path, 8)
    assert (len(train), held_out.labels.tolist()) == (4, [1])
    assert held_out.class_names == train.class_names == ("cat", "dog")
    save(tmp_path / test / "fox" / "7.png", pixels(5, 5))
    with pytest.raises(DataFormatError, match="the folders fox are not among the 2 classes"):
        ImageFolder.train_and_test(tmp_path, 8)


def test_load_splits_by_seed(tmp_path):
    root = write_shapes(tmp_path / "shapes", each=5, size=(12, 10), end="png")
    train, test = load(root, image_size=8)
    assert (len(train), len(test)) == (12, 3)
    assert test.labels.tolist() == [0, 1, 2]  # each class has its share
    assert sorted((*train.files, *test.files)) == sorted(ImageFolder(root, 8).files)
    assert load(root, image_size=8, seed=0)[1].files == test.files
    assert any(load(root, image_size=8, seed=s)[1].files != test.files for s in range(1, 5))
    assert test[:][0][0].tolist() == decoded(root / test.files[0]).tolist()
    assert load(root, mode="L")[0].images.shape == (12, 1, 64, 64)


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture
def count(monkeypatch):
    """The names of the files that are decoded."""
    names, lock = [], threading.Lock()

    def counted(path, *rest):
        with lock:
            names.append(path.name)
        return decode(path, *rest)

    monkeypatch.setattr(image_folder, "decode", counted)
    return names


def test_a_folder_is_decoded_once(tmp_path, cache, count):
    root = two_classes(tmp_path / "pets")
    first = ImageFolder(root, 8)
    assert len(count) == 4
    assert isinstance(first.images, np.memmap)
    assert not first.images.flags.writeable
    assert len(list(cache.iterdir())) == 1
    assert ImageFolder(root, 8).images.tolist() == first.images.tolist()
    assert len(count) == 4
    made = {"size": lambda: ImageFolder(root, 6), "mode": lambda: ImageFolder(root, 8, mode="L")}
    for number, other in enumerate(made.values(), 2):
        other()
        assert len(count) == 4 * number
    time.sleep(0.01)
    save(root / "dog" / "1.png", pixels(9, 9, seed=99))  # another time, if not another size
    changed = ImageFolder(root, 8)
    assert len(count) == 16
    assert changed.images[2].tolist() == decoded(root / "dog/1.png").tolist()
    elsewhere = ImageFolder(root, 8, cache=tmp_path / "mine")
    assert len(list((tmp_path / "mine").iterdir())) == 1
    assert elsewhere.images.tolist() == changed.images.tolist()


def test_folders_of_the_same_names_sizes_and_times_are_told_apart(tmp_path):
    for which, colour in (("a", RED), ("b", GREEN)):
        for name in ("cat/1.bmp", "dog/1.bmp"):
            path = save(tmp_path / which / "pets" / name, flat("RGB", colour))
            os.utime(path, (1, 1))  # as an archive or a checkout may leave them
    red, green = (ImageFolder(tmp_path / which / "pets", 4).images[0, :, 0, 0] for which in "ab")
    assert (red.tolist(), green.tolist()) == (list(RED), list(GREEN))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
        lambda content: content[:-270] + bytes([content[-270] ^ 1]) + content[-269:],
        lambda content: content[:-256] + b"[" * 256,
        lambda content: content + content[-256:],
    ],
)
def test_a_damaged_cache_is_made_anew(tmp_path, cache, count, damage):
    root = two_classes(tmp_path / "pets")
    expected = ImageFolder(root, 8).images.tolist()
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert ImageFolder(root, 8).images.tolist() == expected
    assert len(count) == 8
    assert list(cache.iterdir()) == [path]


def test_a_full_disk(tmp_path, cache, monkeypatch):
    root = two_classes(tmp_path / "pets")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"not be written .*No space left.*cache=") as raised:
            ImageFolder(root, 8)
    assert raised.value.errno == errno.ENOSPC
    assert not list(cache.iterdir())
    assert len(ImageFolder(root, 8)) == 4


def test_two_at_once_and_what_a_killed_one_left(tmp_path, cache):
    root = two_classes(tmp_path / "pets")
    cache.mkdir(parents=True)
    left, fresh = cache / ".pets-0.images.ab.tmp", cache / ".pets-1.images.cd.tmp"
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (0, 0))
    made = []
    both = [threading.Thread(target=lambda: made.append(ImageFolder(root, 8))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert made[0].images.tolist() == made[1].images.tolist()
    assert sorted(path.suffix for path in cache.iterdir()) == [".images", ".tmp"]
    assert fresh.exists()


def test_a_large_cache_is_looked_at_in_places(tmp_path, cache, monkeypatch, count):
    root = two_classes(tmp_path / "pets")
    ImageFolder(root, 8)
    (path,) = cache.iterdir()
    content = bytearray(path.read_bytes())
    content[3 * 8 * 8 + 5] ^= 1  # in the second image
    path.write_bytes(content)
    monkeypatch.setattr(image_cache, "_LOOKED_AT", 2 * 3 * 8 * 8)
    ImageFolder(root, 8)
    assert len(count) == 4  # the first and the third were looked at
    monkeypatch.setattr(image_cache, "_LOOKED_AT", 1 << 20)
    ImageFolder(root, 8)
    assert len(count) == 8


# --- in use ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_of_600_images_is_learnt(tmp_path):
    train, test = load(write_shapes(tmp_path / "shapes"), image_size=24)
    assert (len(train), len(test)) == (480, 120)
    model = ResNet20(num_classes=3, input_size=24, device="cpu", seed=0)
    model.preprocess = Normalize(mean=0.5, std=0.25)
    options = {"epochs": 6, "batch_size": 32, "lr": 0.003, "schedule": "cosine"}
    run = Trainer(model, train, None, test, None, **options, verbose=False)
    run.train()
    assert run.test_acc_list[-1] >= 0.97
    assert model.info.class_names == ("circle", "square", "triangle")
