"""The picture of what augmentation does."""

import sys

import numpy as np
import pytest

from portacnn.augment import HorizontalFlip, RandomCrop, Shift, apply
from portacnn.errors import DependencyError, ShapeError
from portacnn.plot import augmented
from support.matrix import EACH_LIBRARY

pytestmark = EACH_LIBRARY


def test_it_shows_originals_and_what_a_training_sees(backend):
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    for images, ends in (
        (rng.random((3, 1, 6, 5)).astype("float32"), (0, 1)),
        (rng.integers(0, 256, (3, 3, 6, 5)).astype("uint8"), (0, 255)),
        (rng.normal(size=(1, 2, 6, 5)).astype("float32"), None),
    ):
        black, white = ends or (images.min(), images.max())
        figure = augmented(backend.array(images), [Shift(1), HorizontalFlip()], variants=4, seed=3)
        shown = [axes.images[0].get_array() for axes in figure.axes]
        assert len(shown) == 5 * len(images)
        expected = [images]
        for epoch in range(4):
            options = {"seed": 3, "epoch": epoch, "input_range": (black, white)}
            expected.append(apply([Shift(1), HorizontalFlip()], images, **options).images)
        for row in range(len(images)):
            for column, batch in enumerate(expected):
                image = (batch[row].astype("float64") - black) / (white - black)
                image = image.transpose(1, 2, 0) if len(image) == 3 else image.mean(0)
                np.testing.assert_allclose(shown[row * 5 + column], image, atol=1e-6)


def test_what_it_refuses(monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(ShapeError, match=r"expected 1 to 24 images \(N, C, H, W\), got 3x4"):
        augmented(np.zeros((3, 4)), Shift())
    with pytest.raises(ShapeError, match=r"RandomCrop: images \(4, 4\)"):
        augmented(np.zeros((1, 1, 4, 4)), RandomCrop(0, 9))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match="pip install"):
        augmented(np.zeros((1, 1, 4, 4)), Shift())
