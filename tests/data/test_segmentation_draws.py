"""Scales, crops, flips and colours are distributed as those of mmsegmentation."""

import json

import numpy as np
import pytest
import scipy.stats

from tests.data import mmsegmentation_draws as draws
from vssd_jax.data import segmentation_transforms as transforms

RECORDED = json.loads(draws.RECORDED.read_text())
SAMPLES = 2000
LEAST = 1e-4  # probability, in each of 18 comparisons, of a difference as great by chance


distort = transforms.photometric_distortion


class Other:
    """A generator with another range: `replaced` maps arguments of `name` to those it gets."""

    def __init__(self, rng, name, replaced):
        self._rng, self._name, self._replaced = rng, name, replaced

    def __getattr__(self, name):
        function = getattr(self._rng, name)
        if name != self._name:
            return function
        return lambda *given, **options: function(*self._replaced.get(given, given), **options)


def crops(rng, **options):
    image, label = draws.picture()
    element = {"image": image, "label": label, "replaced": 0}
    options = {"crop": draws.CROP, "short": draws.SHORT, "long": draws.LONG} | options
    out = transforms.train_transform(element, rng, **options)
    height, width = out["image_shape"]
    return draws.geometry(out["image"][:height, :width], out["label"][:height, :width])


def windows(rng, max_ratio=0.75):
    rows, columns = transforms.random_crop_window(draws.corner(), (8, 8), max_ratio, rng)
    return {"window": 100 * rows.start + columns.start}


def distortions(rng):
    return draws.colours(distort(draws.COLOURS, rng))


@pytest.fixture(autouse=True)
def pixels_as_they_are(monkeypatch):
    """In `train_transform`, so that they tell where they are from."""
    monkeypatch.setattr(transforms, "photometric_distortion", lambda image, rng: image)


def probabilities(sample, rng=None, **options):
    """name -> probability of a difference as great as that to mmsegmentation, or greater."""
    rng = rng or np.random.default_rng(0)
    ours = draws.histograms(sample(rng, **options) for _ in range(SAMPLES))
    return {name: compare(counts, RECORDED[name]) for name, counts in ours.items()}


def compare(ours, theirs):
    """The probability by chi-square of two histograms; rare values count as one."""
    table = np.array([[h.get(value, 0) for value in ours | theirs] for h in (ours, theirs)])
    rare = table.sum(0) * SAMPLES < 5 * table.sum()
    table = np.c_[table[:, ~rare], table[:, rare].sum(1)]
    return scipy.stats.chi2_contingency(table[:, table.any(0)], correction=False).pvalue


def test_all_are_distributed_as_in_mmsegmentation():
    found = {name: p for f in (crops, windows, distortions) for name, p in probabilities(f).items()}
    assert found.keys() == RECORDED.keys()
    assert min(found.values()) > LEAST, found


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scales": (0.5, 1.9)}, "columns seen"),
        ({"scales": (0.55, 2.0)}, "rows seen"),
        ({"flip": 0.6}, "direction"),
        ({"max_ratio": 1.0}, "window"),
        ({"max_ratio": 0.9}, "window"),
    ],
)
def test_other_options_are_told_apart(options, name):
    sample = windows if name == "window" else crops
    assert probabilities(sample, **options)[name] < LEAST


@pytest.mark.parametrize(
    ("function", "given", "replaced", "name"),
    [  # brightness; contrast and saturation; hue; the probability of each
        ("uniform", (-32, 32), (-24, 24), "colour 0"),
        ("uniform", (0.5, 1.5), (0.6, 1.4), "colour 0"),
        ("integers", (-18, 18), (-12, 12), "colour 4"),
        ("integers", (2,), (3,), "colour 0"),
    ],
)
def test_other_colours_are_told_apart(function, given, replaced, name):
    rng = Other(np.random.default_rng(0), function, {given: replaced})
    assert probabilities(distortions, rng)[name] < LEAST
