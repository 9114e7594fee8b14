"""Sizes that pictures are scaled to."""

import numpy as np
import pytest

from vssd_jax.data.sizes import common_shapes, fitted_size, fitted_sizes


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


def test_many_sizes_are_fitted_as_one():
    rng = np.random.default_rng(0)
    sizes, short = rng.integers(1, 3000, (500, 2)), rng.integers(400, 800, 500)
    found = fitted_sizes(sizes, short, 1333)
    for size, side, result in zip(sizes.tolist(), short.tolist(), found.tolist(), strict=True):
        assert tuple(result) == fitted_size(tuple(size), side, 1333)


def test_the_smallest_shape_that_holds_a_batch():
    shapes = [(8, 13), (13, 8), (8, 10), (10, 8)]
    for batch, expected in (
        ([(8, 10), (7, 3)], 2), ([(8, 11), (7, 3)], 0), ([(10, 1)], 3), ([(8, 8)], 2),
        ([(8, 13), (8, 13), (13, 8)], 0), ([(8, 13), (13, 8), (13, 8)], 1),  # none holds all
        ([(16, 26)], 0), ([(20, 10)], 1),
    ):  # fmt: skip
        assert common_shapes(np.array(batch), shapes) == expected
    assert common_shapes(np.array([[(8, 11)], [(10, 1)]]), shapes).tolist() == [0, 3]
