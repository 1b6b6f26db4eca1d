"""Transforms that move pixels, against SciPy and NumPy. A range of one value makes a transform
certain."""

import numpy as np
import pytest
from scipy import ndimage

from portacnn.augment import (
    Affine,
    HorizontalFlip,
    RandomCrop,
    RandomResizedCrop,
    Rotation,
    Scale,
    Shift,
    VerticalFlip,
    apply,
)
from portacnn.errors import ShapeError
from support.matrix import EACH_LIBRARY

pytestmark = EACH_LIBRARY
RNG = np.random.default_rng(0)
SIZES = [(8, 8), (9, 12), (1, 5)]


def images(count=4, size=(8, 8), channels=2):
    return RNG.random((count, channels, *size)).astype("float32")


def linear(x, matrix, moved=(0.0, 0.0), fill=0.0):
    """x (N, C, H, W) with SciPy: ``matrix`` and ``moved`` say where the output at (row, column)
    from the centre is read."""
    size = np.array(x.shape[2:])
    centre = (size - 1) / 2
    offset = centre - np.asarray(matrix) @ centre + moved
    made = np.empty(x.shape)
    for place in np.ndindex(x.shape[:2]):
        # a border, for SciPy does not interpolate between the image and what is outside
        wide = np.pad(x[place].astype("float64"), 30, constant_values=fill)
        made[place] = ndimage.affine_transform(
            wide, matrix, offset + 30, x.shape[2:], order=1, cval=fill
        )
    return made


def turn(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, s], [-s, c]])


CERTAIN = {
    "turned": (Rotation((25.0, 25.0)), turn(25)),
    "turned back": (Rotation((-70.0, -70.0)), turn(-70)),
    "larger": (Scale((1.5, 1.5)), np.eye(2) / 1.5),
    "smaller": (Scale((0.4, 0.4)), np.eye(2) / 0.4),
    "leaning": (Affine(0.0, 0.0, (1.0, 1.0), (20.0, 20.0)), [[1, 0], [np.tan(np.radians(20)), 1]]),
    "everything": (
        Affine((40.0, 40.0), 0.0, (0.8, 0.8), (10.0, 10.0)),
        # what is applied last is undone first
        np.eye(2) / 0.8 @ [[1, 0], [np.tan(np.radians(10)), 1]] @ turn(40),
    ),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CERTAIN)
def test_it_reads_where_scipy_does(backend, case, size):
    transform, matrix = CERTAIN[case]
    x = images(2, size)
    made = backend.host(apply(transform, backend.array(x)).images)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, linear(x, np.asarray(matrix)), atol=2e-3)


def test_an_angle_is_counterclockwise(backend):
    x = images(2, (7, 7))
    made = backend.host(apply(Rotation((90.0, 90.0)), backend.array(x)).images)
    np.testing.assert_array_equal(made, np.rot90(x, axes=(2, 3)))


def test_a_list_is_one_warp_in_its_order(backend):
    """A shift out of the frame and back loses nothing."""
    x = images(3, (9, 8))
    there, back = Affine((30.0, 30.0), 0.0, (1.0, 1.0)), Affine((-30.0, -30.0), 0.0, (1.0, 1.0))
    made = backend.host(apply([there, back], backend.array(x)).images)
    np.testing.assert_allclose(made, x, atol=2e-3)
    turned = Rotation((20.0, 20.0))
    made = backend.host(apply([turned, HorizontalFlip(1.0)], backend.array(x)).images)
    np.testing.assert_allclose(made, linear(x, turn(20))[..., ::-1], atol=2e-3)
    made = backend.host(apply([HorizontalFlip(1.0), turned], backend.array(x)).images)
    np.testing.assert_allclose(made, linear(x[..., ::-1], turn(20)), atol=2e-3)


@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
def test_nothing_to_do_changes_no_bits(backend, size):
    x = images(3, size) - 0.5
    certain = Affine(0.0, 0.0, (1.0, 1.0))
    for transforms in (
        [],
        Rotation(0.0),
        Rotation(180.0, p=0.0),
        Scale((1.0, 1.0)),
        RandomResizedCrop((1.0, 1.0), (1.0, 1.0)),
        [HorizontalFlip(1.0), certain, HorizontalFlip(1.0)],
        [VerticalFlip(1.0), Rotation((180.0, 180.0)), HorizontalFlip(1.0)],
        RandomCrop(3, p=0.0),
    ):
        np.testing.assert_array_equal(backend.host(apply(transforms, backend.array(x)).images), x)


def shifted(x, rows, columns, fill):
    h, w = x.shape[-2:]
    wide = np.pad(x, ((0, 0), (9, 9), (9, 9)), constant_values=fill)
    return wide[:, 9 - rows : 9 - rows + h, 9 - columns : 9 - columns + w]


@pytest.mark.parametrize("transform", [Shift((2, 1), fill=0.25), RandomCrop((2, 1), fill=0.25)])
def test_every_place_is_drawn_as_often(backend, transform):
    x = np.broadcast_to(images(1, (6, 5)), (600, 2, 6, 5)).copy()
    made = backend.host(apply(transform, backend.array(x)).images)
    counts = {}
    for place in np.ndindex(5, 3):
        expected = shifted(x[0], place[0] - 2, place[1] - 1, 0.25)
        counts[place] = int((made == expected).all(axis=(1, 2, 3)).sum())
    assert sum(counts.values()) == 600
    assert 20 <= min(counts.values()) <= max(counts.values()) <= 62  # 40 is expected


def test_parts_of_another_size(backend):
    x = images(50, (7, 9))
    made = backend.host(apply(RandomCrop(1, (4, 10)), backend.array(x)).images)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = {
        (r, c)
        for n in range(50)
        for r in range(6)
        for c in range(2)
        if (made[n] == padded[n, :, r : r + 4, c : c + 10]).all()
    }
    assert len(found) == 12
    with pytest.raises(
        ShapeError, match=r"RandomCrop: images .7, 9. with padding .0, 0. are small"
    ):
        apply(RandomCrop(0, 8), backend.array(x))


def test_resized_parts_lie_within_the_image(backend):
    """On a picture whose values are its coordinates, the corners say what was cut out."""
    rows, columns = np.mgrid[:40, :60].astype("float32")
    x = np.broadcast_to(np.stack([rows, columns]), (200, 2, 40, 60)).copy()
    made = apply(RandomResizedCrop((0.1, 0.5), (0.5, 2.0)), backend.array(x), input_range=(0, 60))
    made = backend.host(made.images)
    white = apply(RandomResizedCrop((0.1, 1.0)), backend.array(np.ones_like(x))).images
    assert (backend.host(white) == 1.0).all()  # the edge is not mixed with a border
    step = (
        (made[:, 0, -2, 30] - made[:, 0, 1, 30]) / 37,
        (made[:, 1, 20, -2] - made[:, 1, 20, 1]) / 57,
    )
    area, ratio = step[0] * step[1], step[1] / step[0]
    assert 0.099 <= area.min() < 0.15
    assert 0.45 < area.max() <= 0.505
    assert abs(area.mean() - 0.3) < 0.02
    assert 0.49 < ratio.min() < 0.6
    assert 1.7 < ratio.max() < 2.02
    assert abs(np.log(ratio).mean()) < 0.06


def test_angles_and_factors_are_drawn_evenly(backend):
    """Read off boxes: a point to the right of the centre."""
    x = np.zeros((500, 1, 40, 40), "float32")
    point = np.broadcast_to(np.float32([30.0, 20.0, 30.0, 20.0]), (500, 1, 4)).copy()
    transforms = [Rotation((-30.0, 60.0)), Scale((0.5, 2.0))]
    made = apply(transforms, backend.array(x), boxes=backend.array(point), epoch=3)
    dx, dy = (backend.host(made.boxes)[:, 0, :2] - 20.0).T
    radius, angle = np.hypot(dx, dy) / 10, np.degrees(np.arctan2(-dy, dx))
    whole = radius < 1.9  # others may be cut off
    assert -30.1 < angle[whole].min() < -25
    assert 55 < angle[whole].max() < 60.1
    assert abs(angle[whole].mean() - 15) < 4
    assert 0.49 < radius.min() < 0.55
    assert radius.max() < 2.01
    assert abs(np.log(radius).mean()) < 0.06


def test_masks_and_boxes_go_along(backend):
    """A bright rectangle, the mask of it and the box around it stay one thing."""
    x = np.zeros((40, 1, 24, 32), "float32")
    x[:, :, 8:16, 10:22] = 1.0
    mask = x[:, 0].astype("uint8")
    boxes = np.broadcast_to(np.float32([10.0, 8.0, 22.0, 16.0]), (40, 1, 4)).copy()
    transforms = [Shift(4), HorizontalFlip(), RandomCrop(2, (22, 30))]
    made = apply(transforms, *map(backend.array, (x, mask)), boxes=backend.array(boxes))
    image, labels, found = map(backend.host, made)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, image[:, 0])
    for n in range(40):
        rows, columns = np.nonzero(image[n, 0])
        expected = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(found[n, 0], expected, atol=1e-4)
    transforms = Affine(20.0, 0.1, (0.7, 1.2), 10.0)
    shares = np.stack([1 - x[:, 0], x[:, 0]], axis=1)
    for targets in (mask, shares):
        made = apply(transforms, *map(backend.array, (x, targets)), boxes=backend.array(boxes))
        image, labels, found = map(backend.host, made)
        if targets is mask:
            assert ((labels == 1) >= (image[:, 0] > 0.99)).all()
            assert ((labels == 1) <= (image[:, 0] > 0.01)).all()
        else:
            np.testing.assert_array_equal(labels[:, 1], image[:, 0])
        for n in range(40):
            rows, columns = np.nonzero(image[n, 0] > 0.5)
            inside = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            np.testing.assert_allclose(found[n, 0], inside, atol=1.5)


def test_what_a_mask_holds_outside(backend):
    mask = np.ones((3, 4, 5), "int64")
    made = apply(
        RandomCrop((4, 0), fill=1.0),
        backend.array(np.zeros((3, 2, 4, 5), "float32")),
        backend.array(mask),
        input_range=((0.0, 1.0), (2.0, 3.0)),
        fill=-100,
        epoch=1,
    )
    outside = backend.host(made.targets) == -100
    assert outside.any()
    image = backend.host(made.images)
    np.testing.assert_array_equal(image[:, 0], 2.0 * outside)
    np.testing.assert_array_equal(image[:, 1], 3.0 * outside)


def test_large_images_need_wider_numbers(backend):
    """Where 32 bits are not enough for a coordinate, 64 are used."""
    x = np.arange(20000, dtype="float32").reshape(1, 1, 1, 20000)
    options = {"input_range": (0.0, 20000.0)}
    made = apply(Scale((0.5, 0.5)), backend.array(x), **options).images
    made = backend.host(made)[0, 0, 0]
    np.testing.assert_array_equal(made[5000:15000], np.arange(0.5, 20000, 2))
    assert not made[:4999].any()
    assert not made[15001:].any()
    made = backend.host(apply(Scale((16.0, 16.0)), backend.array(x), **options).images)
    np.testing.assert_allclose(made[0, 0, 0], np.linspace(9375, 10624, 20000), atol=0.5)


def test_each_border_has_its_own_fill(backend):
    x = backend.array(np.zeros((9, 1, 4, 4), "float32"))
    made = apply([RandomCrop((9, 0), fill=1.0), RandomCrop((0, 9), fill=0.5)], x).images
    assert set(np.unique(backend.host(made)).tolist()) == {0.0, 0.5, 1.0}
