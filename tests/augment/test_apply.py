"""Lists of transforms: their random numbers, the range of images, arguments, and JSON."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from portacnn.augment import (
    Affine,
    Brightness,
    Contrast,
    CutMix,
    CutOut,
    HorizontalFlip,
    MixUp,
    RandomCrop,
    RandomResizedCrop,
    Rotation,
    Scale,
    Shift,
    Transform,
    VerticalFlip,
    apply,
    named,
    standard,
)
from portacnn.augment.applying import KINDS, describe_augment, rebuild_augment, word_of
from portacnn.errors import ArgumentError, ArrayError, ModelFormatError, ShapeError

RNG = np.random.default_rng(2)
EACH = [
    Shift(),
    HorizontalFlip(),
    VerticalFlip(0.3),
    RandomCrop(2),
    RandomResizedCrop(),
    Rotation(30.0, p=0.5),
    Scale((0.8, 1.5)),
    Affine(20.0, 0.2, (0.8, 1.3), 10.0),
    Brightness(),
    Contrast((0.5, 2.0)),
    CutOut(3),
    MixUp(),
    CutMix(p=0.5),
]


def test_the_words_are_those_of_the_hash(backend):
    """In Python's whole numbers, written down again from the papers: one flip an image."""
    import hashlib

    def mixed(x):
        for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 14

    def word(seed, epoch, index, number):
        digest = hashlib.sha256(repr((seed, "augment")).encode()).digest()
        halves = []
        for half in (digest[:4], digest[4:8]):
            value = int.from_bytes(half, "little")
            for part in (epoch % 2**32, epoch >> 32, index % 2**32, index >> 32):
                value = mixed(value ^ part)
            halves.append(value)
        x = number ^ halves[0]
        x = (x ^ x >> 17) * 0xED5AD4BB % 2**32 ^ halves[1]
        for shift, factor in ((11, 0xAC4C1B51), (15, 0x31848BAB)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 14

    x = np.zeros((20, 1, 1, 2), "float32")
    x[..., 1] = 1.0
    indices = [*range(15), 2**31, 2**32, 2**33 + 7, 10**12, 2**40]
    made = apply(
        [Brightness(0.0), HorizontalFlip()], backend.array(x), seed=5, epoch=3, indices=indices
    )
    flipped = backend.host(made.images)[:, 0, 0, 0] == 1.0
    assert flipped.tolist() == [word(5, 3, index, 8) < 2**31 for index in indices]


def test_every_backend_reads_the_same_pixels(backend):
    """In whole numbers up to rounding: the same coordinates, so the same bits but for sums."""
    x, labels = RNG.random((7, 2, 9, 11)).astype("float32"), np.arange(7) % 3
    for transform in EACH:
        mean = isinstance(transform, Contrast)
        made = apply(transform, backend.array(x), backend.array(labels), classes=3, epoch=4)
        there = apply(transform, x, labels, classes=3, epoch=4)
        assert made.images.dtype == backend.array(x).dtype
        assert made.images.device == backend.array(x).device
        for ours, theirs in zip(made[:2], there[:2], strict=True):
            np.testing.assert_allclose(backend.host(ours), theirs, rtol=0, atol=1e-6 * mean)


def test_an_image_does_not_depend_on_its_batch(backend):
    x = RNG.random((30, 1, 6, 6)).astype("float32")
    transforms = [each for each in EACH if not isinstance(each, MixUp | CutMix)]
    whole = backend.host(apply(transforms, backend.array(x), epoch=2).images)
    order = RNG.permutation(30)[:7]
    part = apply(transforms, backend.array(x[order]), epoch=2, indices=order.tolist()).images
    np.testing.assert_array_equal(backend.host(part), whole[order])


def test_seed_epoch_index_and_place_matter():
    x = np.broadcast_to(RNG.random((1, 1, 8, 8)).astype("float32"), (40, 1, 8, 8)).copy()
    made = [
        apply([Rotation(90.0)], x).images,
        apply([Rotation(90.0)], x, seed=1).images,
        apply([Rotation(90.0)], x, epoch=1).images,
        apply([Rotation(90.0)], x, indices=np.arange(40, 80)).images,
        apply([Rotation(0.0), Rotation(90.0)], x).images,
    ]
    assert len({image.tobytes() for each in made for image in each}) > 190
    again = apply([Rotation(90.0), Rotation(0.0)], x).images
    np.testing.assert_array_equal(again, made[0])


def test_nothing_is_written_into_what_was_given(backend):
    x, labels = RNG.random((4, 1, 5, 5)).astype("float32"), np.arange(4)
    given, targets = backend.array(x), backend.array(labels)
    apply(EACH, given, targets, classes=4)
    np.testing.assert_array_equal(backend.host(given), x)
    np.testing.assert_array_equal(backend.host(targets), labels)


def test_bytes_stay_bytes(backend):
    x = RNG.integers(0, 256, (30, 3, 6, 6)).astype("uint8")
    made = apply([HorizontalFlip(1.0), Brightness((1.5, 1.5))], backend.array(x)).images
    expected = np.minimum((x[..., ::-1].astype("int64") * 3 + 1) // 2, 255)  # rounded
    np.testing.assert_array_equal(backend.host(made), expected)
    assert str(made.dtype).endswith("uint8")


def test_other_inputs_than_images():
    x = RNG.random((4, 2, 9))
    made = apply([Brightness(), Contrast(), MixUp()], x).images
    assert made.shape == x.shape
    assert made.dtype == np.float64
    with pytest.raises(ShapeError, match=r"expected images \(N, C, H, W\), got 4x2x9"):
        apply([Brightness(), Shift()], x)
    with pytest.raises(ArrayError, match="floating point or uint8"):
        apply([Brightness()], x.astype("int64"))


def test_standard_lists():
    for shape, kinds in (
        ((1, 28, 28), [Affine]),
        ((3, 32, 32), [HorizontalFlip, RandomCrop]),
        ((3, 224, 224), [HorizontalFlip, RandomResizedCrop, Brightness, Contrast]),
        ((4, 100), [Brightness, Contrast]),
    ):
        transforms = standard(shape)
        assert [type(each) for each in transforms] == kinds
        assert apply(transforms, RNG.random((2, *shape))).images.shape == (2, *shape)


def test_words_stand_for_transforms():
    text = "horizontal_flip, random_crop=2,Rotation=-5..20,cut-out=4,mix_up=0.5,standard"
    same = [HorizontalFlip(), RandomCrop(2), Rotation((-5, 20)), CutOut(4), MixUp(0.5)]
    same += [HorizontalFlip(), RandomCrop(4)]
    assert named(text, (3, 32, 32)) == same
    for kind in KINDS:
        assert named(word_of(kind)) == [KINDS[kind]()]
    assert word_of("RandomResizedCrop") == "random_resized_crop"
    x = RNG.random((5, 3, 8, 8))
    mixed = [Shift(1), "vertical_flip=1", "standard"]  # in a list, beside transforms
    made = apply([Shift(1), VerticalFlip(1.0), *standard((3, 8, 8))], x).images
    np.testing.assert_array_equal(apply(mixed, x).images, made)


def test_they_are_written_as_json_and_read():
    described = json.loads(json.dumps(describe_augment(EACH)))
    assert rebuild_augment(described) == EACH
    assert {type(each).__name__ for each in EACH} == set(KINDS)
    assert rebuild_augment(None) == []


@dataclass(frozen=True)
class Inverted(Transform):
    p: float = 0.5

    images_only = False

    def apply(self, batch, draw):
        x = batch.images
        batch.images = draw.where_applied(self.p, batch.black + batch.white - x, x)


def test_one_of_your_own(backend):
    x = RNG.random((100, 2, 3)).astype("float32")
    made = backend.host(apply(Inverted(), backend.array(x), input_range=(0.0, 2.0)).images)
    inverted = (made != x).any(axis=(1, 2))
    np.testing.assert_array_equal(made, np.where(inverted[:, None, None], np.float32(2) - x, x))
    assert 35 <= inverted.sum() <= 65
    with pytest.raises(ArgumentError, match=r"a file can hold the transforms Shift.*Inverted"):
        describe_augment([Inverted()])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Shift(-1), "pixels must be a whole number of at least 0, got -1"),
        (lambda: Shift((1, 2, 3)), r"pixels must be a whole number or \(rows, columns\)"),
        (lambda: Shift(1.5), r"pixels must be a whole number or \(rows, columns\), got 1.5"),
        (lambda: HorizontalFlip(2.0), "p must lie in 0 <= p <= 1"),
        (lambda: Shift(1, fill=3.0), "fill must lie in 0 <= fill <= 1"),
        (lambda: Rotation((30.0, 10.0)), r"degrees must be \(low, high\) in this order"),
        (lambda: Rotation(1e9), "degrees must be a finite number in -360..360"),
        (lambda: Scale(2.0), r"factor must be \(low, high\), such as \(0.9, 1.1\), got 2.0"),
        (lambda: Scale((0.0, 2.0)), "factor must be a finite number in 0.0625..16"),
        (lambda: Affine(shear=89.0), "shear must be a finite number in -60..60"),
        (lambda: RandomCrop(1, 4, p=0.5), "all images are changed, so p must be 1"),
        (lambda: RandomResizedCrop((0.5, 2.0)), r"area\[1\] must lie in 0"),
        (lambda: RandomResizedCrop((1e-9, 1.0)), "area must be at least"),
        (lambda: Brightness(2.0), "factor must be factors of 0 or more, got -1 to 3"),
        (lambda: CutOut(0), "size must be a whole number of at least 1"),
        (lambda: MixUp(0.0), "alpha must be a finite number above 0"),
        (lambda: CutMix(1e6), "alpha must be in 0.01..100"),
        (lambda: apply([Shift], np.zeros((1, 1, 2, 2))), r"make an object of it: Shift\(\.\.\.\)"),
        (lambda: apply("flip", np.zeros((1, 1, 2, 2))), "unknown transform 'flip'; known are stan"),
        (lambda: named("shift=2,random_corp=2"), "'random_corp=2'; did you mean random_crop"),
        (lambda: named("standard"), r"use augment\.standard\(input_shape\)"),
        (lambda: named("shift,"), "unknown transform ''"),
        (lambda: named("standard=2", (1, 8, 8)), "unknown transform 'standard=2'"),
        (lambda: named("shift=far"), "shift=far: expected a number or LOW..HIGH, got 'far'"),
        (lambda: named("shift="), "shift=: expected a number"),
        (lambda: named("rotation=1..2..3"), "must be a number or .low, high., got .1, 2, 3"),
        (lambda: named("shift=1.5"), "shift=1.5: pixels must be a whole number"),
        (lambda: named("rotation=nan"), "rotation=nan: degrees must be a finite number"),
        (
            lambda: apply(Brightness(), np.zeros((1, 1, 2, 2)), input_range=(1, 0)),
            r"input_range must be \(black, white\) in this order",
        ),
    ],
)
def test_nonsense(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_keywords_of_others_are_answered():
    with pytest.raises(TypeError, match="Rotation does not take angle"):
        Rotation(angle=3)
    assert replace(Rotation(10.0), p=0.5).degrees == (-10.0, 10.0)


@pytest.mark.parametrize(
    "change",
    [
        {"class": "Unknown"},
        {"class": "Shift", "arguments": {"pixels": [1, 1], "mode": "edge"}},
        {"class": "os.system", "arguments": {}},
    ],
)
def test_what_a_file_may_not_say(change):
    with pytest.raises((ModelFormatError, TypeError, KeyError)):
        rebuild_augment([change])
