"""Sizes that pictures are scaled to."""

import pytest

from vssd_jax.data.sizes import fitted_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (512, 683)), ((640, 480), (683, 512)), ((100, 900), (228, 2048))],
)
def test_fitted_size(size, expected):
    assert fitted_size(size, 512, 2048) == expected


def test_fitted_size_in_multiples():
    assert fitted_size((480, 640), 512, 2048, multiple=32) == (512, 672)
    assert fitted_size((3, 900), 512, 2048, multiple=32) == (32, 2048)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1067)), ((426, 640), (800, 1202)), ((300, 640), (625, 1333))],
)
def test_fitted_size_of_detection(size, expected):
    assert fitted_size(size, 800, 1333) == expected


def test_fitted_size_within_a_limit():
    assert fitted_size((480, 640), 800, 1333, limit=(800, 1344)) == (800, 1067)
    assert fitted_size((480, 640), 800, 1333, limit=(600, 1344)) == (600, 800)
    assert fitted_size((480, 640), 800, 1333, limit=(600, 400)) == (300, 400)
