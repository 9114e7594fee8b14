"""Sizes, crops and flips drawn for many pictures at once."""

import pathlib

import numpy as np
import pytest
from scipy import stats

from vssd_jax.data.geometry import draw_geometry
from vssd_jax.data.sizes import fitted_size

SHORT_SIDES = tuple(range(480, 801, 32))


def draw(size, count=400, **options):
    return draw_geometry(np.array([size] * count, np.int32), np.random.default_rng(0), **options)


def test_the_short_schedule_resizes_and_flips():
    sizes = np.array([[480, 640], [640, 427], [300, 640]] * 200, np.int32)
    drawn = draw_geometry(sizes, np.random.default_rng(0))
    np.testing.assert_array_equal(drawn.original, sizes)
    np.testing.assert_array_equal(drawn.first, sizes)
    np.testing.assert_array_equal(drawn.window, np.pad(sizes, ((0, 0), (2, 0))))
    expected = [fitted_size(tuple(size), 800, 1333) for size in sizes.tolist()]
    np.testing.assert_array_equal(drawn.size, expected)
    assert 0.4 < drawn.flip.mean() < 0.6
    assert not draw((9, 9), flip=0.0).flip.any()
    one = drawn.row(1)
    assert tuple(one.size) == expected[1]
    assert one.flip == drawn.flip[1]


def test_the_long_schedule_crops_half_of_them():
    drawn = draw((480, 640), 4000, crop=True, short_sides=SHORT_SIDES)
    cropped = (drawn.first != drawn.original).any(1)
    assert 0.45 < cropped.mean() < 0.55
    firsts = {fitted_size((480, 640), short, 1333) for short in (400, 500, 600)}
    assert set(map(tuple, drawn.first[cropped].tolist())) == firsts
    for first in firsts:
        of_it = drawn.window[(drawn.first == first).all(1)]
        sides, corners = of_it[:, 2:], of_it[:, :2]
        for axis in range(2):
            low, high = min(first[axis], 384), min(first[axis], 600)
            assert (sides[:, axis].min(), sides[:, axis].max()) == (low, high)
            # As likely at the near end as at the far one.
            place = corners[:, axis] / np.maximum(first[axis] - sides[:, axis], 1)
            assert place.min() == 0
            assert place.max() > 0.98
            assert 0.4 < place.mean() < 0.6
    short = drawn.size.min(1)
    assert set(short[~cropped].tolist()) == set(SHORT_SIDES)
    assert drawn.size.max() <= 1333
    np.testing.assert_array_equal(drawn.window[~cropped], [[0, 0, 480, 640]] * (~cropped).sum())


def test_a_panorama_is_shrunk_before_its_crop():
    """The first resize bounds the long side, too: 3000 x 300 pixels become 1333 x 133."""
    drawn = draw((300, 3000), crop=True)
    cropped = (drawn.first != drawn.original).any(1)
    assert set(map(tuple, drawn.first[cropped].tolist())) == {(133, 1333)}
    assert (drawn.window[cropped, 2] == 133).all()
    assert drawn.window[cropped, 3].min() < 390
    assert drawn.window[cropped, 3].max() > 590


def test_the_same_generator_draws_the_same():
    for one, other in zip(draw((50, 60), crop=True), draw((50, 60), crop=True), strict=True):
        np.testing.assert_array_equal(one, other)


def as_recorded(drawn):
    """The columns of `record_mmdet_geometry.py`."""
    scale = drawn.first / drawn.original * drawn.size / drawn.window[:, 2:]
    origin = -drawn.window[:, :2] * drawn.size / drawn.window[:, 2:]
    return np.concatenate(
        [drawn.size, scale[:, ::-1], origin[:, ::-1], drawn.flip[:, None]], axis=1
    )


def least_p(drawn, theirs):
    """Of the Kolmogorov-Smirnov tests of all columns."""
    ours = as_recorded(drawn).astype(np.float32)
    # Rounded: many values are equal but for the last digits.
    return min(
        stats.ks_2samp(np.round(a, 2), np.round(b, 2), method="asymp").pvalue
        for a, b in zip(ours.T, theirs.T, strict=True)
    )


@pytest.mark.parametrize("size", [(480, 640), (640, 427)])
def test_distributions_are_those_of_mmdet(size):
    theirs = np.load(pathlib.Path(__file__).parent / "mmdet_geometry.npz")["x".join(map(str, size))]
    options = {"crop": True, "short_sides": SHORT_SIDES}
    assert least_p(draw(size, 3000, **options), theirs) > 1e-3
    # It would notice: a missing side, another bound of the long one, fewer flips, no crops.
    for wrong in (
        {"short_sides": SHORT_SIDES[1:]}, {"long_side": 1000}, {"flip": 0.4}, {"crop": False},
    ):  # fmt: skip
        assert least_p(draw(size, 3000, **options | wrong), theirs) < 1e-3, wrong
