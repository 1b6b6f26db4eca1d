"""Brightness, contrast, holes and mixtures, against NumPy in float64."""

import numpy as np
import pytest
from scipy import stats

from portacnn.augment import Brightness, Contrast, CutMix, CutOut, MixUp, apply
from portacnn.augment.mixing import beta_quantiles
from portacnn.errors import ArgumentError
from support.matrix import EACH_LIBRARY

pytestmark = EACH_LIBRARY
RNG = np.random.default_rng(1)
RANGE = ((-1.0, -2.0), (1.0, 3.0))  # of two channels
BLACK, WHITE = (np.reshape(end, (1, 2, 1, 1)) for end in RANGE)


def images(count=6, size=(5, 8)):
    return (BLACK + (WHITE - BLACK) * RNG.random((count, 2, *size))).astype("float32")


@pytest.mark.parametrize("kind", [Brightness, Contrast])
def test_factors(backend, kind):
    x = images(300, (4, 4))
    for factor, low, high in ((0.5, 0.5, 1.5), ((0.2, 0.6), 0.2, 0.6)):
        made = apply(kind(factor), backend.array(x), input_range=RANGE).images
        made = backend.host(made)
        assert made.dtype == np.float32
        assert ((made >= BLACK) & (made <= WHITE)).all()
        centre = BLACK if kind is Brightness else x.mean((1, 2, 3), "float64", keepdims=True)
        free = (made > BLACK) & (made < WHITE) & (abs(x - centre) > 0.1)
        ratio = (made - centre) / (x - centre)
        each = np.array([np.median(r[f]) for r, f in zip(ratio, free, strict=True)])
        expected = np.clip(centre + each[:, None, None, None] * (x - centre), BLACK, WHITE)
        np.testing.assert_allclose(made, expected, atol=1e-5)
        assert low - 1e-5 <= each.min() < low + 0.02
        assert high - 0.02 < each.max() <= high + 1e-5
        assert abs(each.mean() - (low + high) / 2) < 0.04


def test_a_share_of_images_keeps_its_bits(backend):
    """Values beyond the range too."""
    x = images(400, (3, 3)) * 3
    for transform in (Brightness(p=0.25), Contrast(p=0.25), CutOut(3, p=0.25), MixUp(p=0.25)):
        made = backend.host(apply(transform, backend.array(x), input_range=RANGE).images)
        changed = (made != x).any(axis=(1, 2, 3))
        assert 70 <= changed.sum() <= 130
        certain = type(transform)(p=0.0) if not isinstance(transform, CutOut) else CutOut(3, p=0.0)
        made = backend.host(apply(certain, backend.array(x), input_range=RANGE).images)
        np.testing.assert_array_equal(made, x)


def test_holes(backend):
    x = images(400)
    made = backend.host(apply(CutOut((3, 4), fill=0.5), backend.array(x), input_range=RANGE).images)
    gray = np.float32((BLACK + WHITE) / 2)
    centres = set()
    for before, after in zip(x, made, strict=True):
        rows, columns = np.nonzero((after != before).any(axis=0))
        r0, r1, c0, c1 = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        expected = before.copy()
        expected[:, r0:r1, c0:c1] = gray[0]
        np.testing.assert_array_equal(after, expected)
        assert r1 - r0 in (2, 3)
        assert c1 - c0 in (2, 3, 4)
        centres.add((r0, r1, c0, c1))
    assert len(centres) == 5 * 8


def test_mixed_up(backend):
    x, labels, weights = images(300, (2, 2)), np.arange(300) % 3, RNG.random(300)
    made = apply(MixUp(0.7), backend.array(x), backend.array(labels), input_range=RANGE, classes=3)
    image, shares = backend.host(made.images), backend.host(made.targets)
    assert shares.dtype == np.float32
    lam = shares[np.arange(300), labels][:, None, None, None].astype("float64")
    np.testing.assert_allclose(image, lam * x + (1 - lam) * np.roll(x, 1, 0), atol=1e-5)
    expected = np.zeros((300, 3))
    expected[np.arange(300), labels] += lam[:, 0, 0, 0]
    expected[np.arange(300), np.roll(labels, 1)] += 1 - lam[:, 0, 0, 0]
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    assert stats.kstest(lam.reshape(-1), stats.beta(0.7, 0.7).cdf).statistic < 0.08
    on = backend.array((weights > 0.5).astype("uint8")[:, None])
    values = backend.host(apply(MixUp(0.7), backend.array(x), on).targets)[:, 0]
    mixed = lam[:, 0, 0, 0] * (weights > 0.5) + (1 - lam[:, 0, 0, 0]) * np.roll(weights > 0.5, 1)
    np.testing.assert_allclose(values, mixed, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.9, 1.0, 3.0, 100.0])
def test_shares_are_from_the_beta_distribution(alpha):
    values = np.array(beta_quantiles(alpha))
    places = (np.arange(values.size) + 0.5) / values.size
    np.testing.assert_allclose(values, stats.beta(alpha, alpha).ppf(places), atol=1e-4)


def test_cut_mixed(backend):
    x, labels = images(300, (6, 7)), np.arange(300) % 300
    mask = np.broadcast_to(labels[:, None, None], (300, 6, 7)).astype("int64").copy()
    given = backend.array(x)
    made = apply(CutMix(), given, backend.array(labels), input_range=RANGE, classes=300)
    masked = apply(CutMix(), given, backend.array(mask), input_range=RANGE)
    image, places = backend.host(made.images), backend.host(masked.targets)
    np.testing.assert_array_equal(backend.host(masked.images), image)
    other = np.roll(x, 1, 0)
    inside = places != mask
    np.testing.assert_array_equal(image, np.where(inside[:, None], other, x))
    assert (places[inside] == (mask[inside] - 1) % 300).all()
    lam = 1 - inside.mean(axis=(1, 2))
    shares = backend.host(made.targets)
    np.testing.assert_allclose(shares[np.arange(300), labels], lam, atol=1e-6)
    np.testing.assert_allclose(shares[np.arange(300), labels - 1], 1 - lam, atol=1e-6)
    for each in inside:
        rows, columns = np.nonzero(each)
        assert (
            not rows.size
            or each[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
        )
    assert 0.1 < (1 - lam).mean() < 0.5
    assert (1 - lam).max() > 0.8


def test_one_image_is_mixed_with_itself(backend):
    x = images(1)
    for transform in (MixUp(), CutMix()):
        made = apply(transform, backend.array(x), backend.array(np.array([1])), classes=2)
        np.testing.assert_array_equal(backend.host(made.images), x)
        np.testing.assert_allclose(backend.host(made.targets), [[0, 1]])
        with pytest.raises(ArgumentError, match="does not mix boxes"):
            apply(transform, backend.array(x), boxes=backend.array(np.zeros((1, 1, 4), "float32")))
