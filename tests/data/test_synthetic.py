"""Images that are made: rotation against SciPy, shapes by their pixels, scenes by their masks."""

import numpy as np
from scipy import ndimage

from portacnn.data import rotate, scenes, shapes
from portacnn.errors import ArgumentError, LabelError, ShapeError
from support.checks import refuses


def test_rotation_equals_scipys():
    """Of 300 images, more than are rotated at once, with two channels and an angle each."""
    x = np.random.default_rng(0).random((300, 2, 7, 10))
    degrees = np.linspace(-200.0, 400.0, 300)
    wide = np.pad(x, ((0, 0), (0, 0), (3, 3), (3, 3)))  # SciPy cuts off at the outermost centres
    expected = [
        ndimage.rotate(image, angle, axes=(2, 1), reshape=False, order=1)
        for image, angle in zip(wide, degrees, strict=True)
    ]
    np.testing.assert_allclose(
        rotate(x, degrees), np.asarray(expected)[:, :, 3:-3, 3:-3], atol=1e-12
    )


def test_rotation_by_a_quarter_is_counterclockwise_and_keeps_the_type():
    x = np.arange(2 * 25, dtype=np.uint8).reshape(2, 1, 5, 5)
    got = rotate(x, 90)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.rot90(x, axes=(2, 3)))


def test_shapes_are_in_the_image_if_the_label_says_so():
    """Area and second moment tell which one it is, if it is alone."""
    x, t = shapes(60, size=96, seed=3)
    assert np.array_equal(x, shapes(60, size=96, seed=3)[0])
    assert not np.array_equal(x, shapes(60, size=96, seed=4)[0])
    assert x.shape == (60, 1, 96, 96)
    assert x.min() >= 0.0
    assert x.max() <= 1.0
    assert len(np.unique(t, axis=0)) == 8
    covered = x[:, 0] > 0.1  # above the noise
    np.testing.assert_array_equal(covered.any(axis=(1, 2)), t.any(axis=1))
    expected = (1.0, 3 / np.pi, 9 / (2 * np.pi * 3**0.5))  # circle, square, triangle
    for image, label in zip(covered, t, strict=True):
        if label.sum() == 1:
            y, z = np.nonzero(image)
            moment = len(y) * (y.var() + z.var())
            assert abs(len(y) ** 2 / (2 * np.pi * moment) - expected[label.argmax()]) < 0.02


def test_scenes_hold_their_objects_and_the_masks_say_which():
    """Images of one value each: every pixel of a scene can be told from its value."""
    values = np.array([100, 200], dtype=np.uint8)
    images = np.zeros((2, 1, 6, 6), dtype=np.uint8)
    images[:, :, 1:5, 1:5] = values[:, None, None, None]
    x, mask = scenes(images, [4, 7], 40, size=16, objects=(1, 1), clutter=0, seed=1)
    assert (x.dtype, mask.dtype, x.shape) == (np.uint8, np.uint8, (40, 1, 16, 16))
    for scene, labels in zip(x[:, 0], mask, strict=True):
        assert np.count_nonzero(scene) == 16  # one object, the whole of it
        np.testing.assert_array_equal(labels, np.select([scene == 100, scene == 200], [5, 8]))
    several, counted = scenes(images, [4, 7], 40, size=64, objects=(0, 3), clutter=0)
    parts = {ndimage.label(m)[1] for m in counted}
    assert parts <= {0, 1, 2, 3}
    assert len(parts) > 2
    np.testing.assert_array_equal(several[:, 0] > 0, counted > 0)
    cluttered, background = scenes(images, [4, 7], 20, size=16, objects=(0, 0), clutter=5)
    assert cluttered.any()
    assert not background.any()


def test_what_does_not_fit_is_refused():
    x = np.zeros((3, 1, 8, 8))
    refuses(ShapeError, "rotate", "(N, C, H, W)", call=lambda: rotate(x[0], 5.0))
    refuses(ShapeError, "rotate", "one angle or 3", call=lambda: rotate(x, [1.0, 2.0]))
    refuses(ArgumentError, "rotate", "finite", call=lambda: rotate(x, [1.0, 2.0, np.nan]))
    refuses(ArgumentError, "size", "at least 16", call=lambda: shapes(1, size=8))
    refuses(LabelError, "scenes", "3 whole numbers", call=lambda: scenes(x, [0.5] * 3, 1))
    refuses(LabelError, "scenes", "0..254", call=lambda: scenes(x, [0, 1, 255], 1))
    refuses(ArgumentError, "size", "at least 8", call=lambda: scenes(x, [0, 1, 2], 1, size=7))
    refuses(ArgumentError, "objects", call=lambda: scenes(x, [0, 1, 2], 1, objects=(2, 1)))


def test_boxes_of_scenes_are_those_of_the_masks():
    """Where objects do not overlap, the box is that of the connected pixels."""
    rng = np.random.default_rng(0)
    images = np.zeros((3, 1, 8, 8), dtype=np.float32)
    images[:, 0, 2:7, 1:6] = rng.uniform(0.5, 1.0, (3, 5, 5))
    images[0, 0, :, 3:] = images[1, 0, 4:, :] = 0.0
    options = {"size": 40, "objects": (0, 4), "clutter": 3, "overlap": 0.0, "seed": 5}
    x, masks = scenes(images, [0, 3, 9], 30, **options)
    same, found = scenes(images, [0, 3, 9], 30, target="boxes", **options)
    np.testing.assert_array_equal(x, same)
    for mask, image in zip(masks, found, strict=True):
        assert (image["boxes"].dtype, image["labels"].dtype) == (np.float32, np.int64)
        again = np.zeros_like(mask)
        for (x1, y1, x2, y2), label in zip(
            image["boxes"].astype(int), image["labels"], strict=True
        ):
            part = mask[y1:y2, x1:x2]
            assert set(np.unique(part)) == {label + 1}  # filled, and no other's pixel
            again[y1:y2, x1:x2] = part
        np.testing.assert_array_equal(again, mask)
    assert {len(image["labels"]) for image in found} >= {0, 1, 2, 3}
    refuses(ArgumentError, "target", call=lambda: scenes(images, [0, 3, 9], 1, target="points"))
    refuses(ArgumentError, "overlap", call=lambda: scenes(images, [0, 3, 9], 1, overlap=2))
