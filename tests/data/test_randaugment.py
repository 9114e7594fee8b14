"""RandAugment against Pillow's operations and against the definition of its distributions."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from vssd_jax.data import randaugment as ra

BICUBIC = Image.Resampling.BICUBIC


def affine(*matrix):
    return lambda picture: picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, resample=BICUBIC, fillcolor=(124, 116, 104)
    )


def solarize_add(amount):
    table = [min(255, i + amount) if i < 128 else i for i in range(256)]
    return lambda picture: picture.point(table * 3)


# (operation, arguments, the same by Pillow on a picture 97 wide and 61 high)
CASES = [
    ("AutoContrast", (), ImageOps.autocontrast),
    ("Equalize", (), ImageOps.equalize),
    ("Invert", (), ImageOps.invert),
    ("PosterizeIncreasing", (0,), lambda p: p.point([0] * 768)),  # Pillow 13 refuses 0 bits
    *[("PosterizeIncreasing", (b,), lambda p, b=b: ImageOps.posterize(p, b)) for b in range(1, 5)],
    *[("SolarizeIncreasing", (t,), lambda p, t=t: ImageOps.solarize(p, t)) for t in (0, 26, 256)],
    *[("SolarizeAdd", (a,), solarize_add(a)) for a in (0, 99, 110)],
    *[
        (f"{name}Increasing", (f,), lambda p, n=name, f=f: getattr(ImageEnhance, n)(p).enhance(f))
        for name in ("Color", "Contrast", "Brightness", "Sharpness")
        for f in (0.1, 0.19, 0.8, 1.37, 1.81, 1.9)
    ],
    *[
        ("Rotate", (a,), lambda p, a=a: p.rotate(a, resample=BICUBIC, fillcolor=(124, 116, 104)))
        for a in (-27.3, 11.0, 30.0)
    ],
    *[("ShearX", (f,), affine(1, f, 0, 0, 1, 0)) for f in (-0.3, -0.011, 0.0, 0.27)],
    *[("ShearY", (f,), affine(1, 0, 0, f, 1, 0)) for f in (-0.3, -0.011, 0.0, 0.27)],
    *[("TranslateXRel", (f,), affine(1, 0, f * 97, 0, 1, 0)) for f in (-0.45, 0.0, 3 / 97, 0.41)],
    *[("TranslateYRel", (f,), affine(1, 0, 0, 0, 1, f * 61)) for f in (-0.45, 0.0, 3 / 61, 0.41)],
]


def picture(kind):
    rng = np.random.default_rng(3)
    if kind == "noise":
        return rng.integers(0, 256, (61, 97, 3), dtype=np.uint8)
    if kind == "flat":  # one grey level per channel
        return np.broadcast_to(np.uint8([7, 130, 255]), (61, 97, 3)).copy()
    small = rng.integers(30, 200, (7, 9, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((97, 61), BICUBIC))


@pytest.mark.parametrize("kind", ["noise", "smooth", "flat"])
@pytest.mark.parametrize(("name", "arguments", "expected"), CASES)
def test_operation_equals_pillow(name, arguments, expected, kind):
    image = picture(kind)
    before = image.copy()
    result = ra.OPERATIONS[name][0](image, *arguments)
    reference = np.asarray(expected(Image.fromarray(image))).astype(int)
    difference = np.abs(result - reference)
    assert result.dtype == np.uint8
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01
    np.testing.assert_array_equal(image, before)


def test_every_operation_is_compared():
    assert {name for name, _, _ in CASES} == set(ra.OPERATIONS)


@pytest.fixture(scope="module")
def draws():
    """Per picture: the list of (name, arguments) of 40,000 draws."""
    rng = np.random.default_rng(2024)
    return [ra.sample_operations(rng) for _ in range(40_000)]


def close(observed_mean, mean, std, n):
    """Within five standard errors."""
    return abs(observed_mean - mean) < 5 * std / math.sqrt(n)


def test_number_of_operations(draws):
    # Two draws, each kept with probability 1/2.
    counts = np.bincount([len(d) for d in draws], minlength=3) / len(draws)
    for count, probability in zip(counts, (0.25, 0.5, 0.25), strict=True):
        assert close(count, probability, math.sqrt(probability * (1 - probability)), len(draws))


def test_operations_are_equally_likely_and_independent(draws):
    kept = [name for d in draws for name, _ in d]
    for name in ra.OPERATIONS:
        assert close(kept.count(name) / len(kept), 1 / 15, math.sqrt(14) / 15, len(kept))
    pairs = [d for d in draws if len(d) == 2]
    repeated = np.mean([a[0] == b[0] for a, b in pairs])  # with replacement
    assert close(repeated, 1 / 15, math.sqrt(14) / 15, len(pairs))


# Magnitudes are N(9, 0.5) clipped to [0, 10]: moments by integration over the density.
MAGNITUDES = np.clip(9 + 0.5 * np.linspace(-6, 6, 200_001), 0, 10)
DENSITY = np.exp(-0.5 * np.linspace(-6, 6, 200_001) ** 2)
DENSITY /= DENSITY.sum()


def moments(function):
    values = function(MAGNITUDES)
    mean = (values * DENSITY).sum()
    return mean, math.sqrt(((values - mean) ** 2 * DENSITY).sum())


def arguments(draws, name):
    return np.array([a[0] for d in draws for n, a in d if n == name])


@pytest.mark.parametrize(
    ("name", "centre", "slope"),
    [
        ("Rotate", 0, 3.0),
        ("ShearX", 0, 0.03),
        ("ShearY", 0, 0.03),
        ("TranslateXRel", 0, 0.045),
        ("TranslateYRel", 0, 0.045),
        ("ColorIncreasing", 1, 0.09),
        ("ContrastIncreasing", 1, 0.09),
        ("BrightnessIncreasing", 1, 0.09),
        ("SharpnessIncreasing", 1, 0.09),
    ],
)
def test_two_sided_magnitudes(draws, name, centre, slope):
    values = arguments(draws, name) - centre
    n = len(values)
    assert close((values > 0).mean(), 0.5, 0.5, n)
    mean, std = moments(lambda m: slope * m)
    for side in (values[values > 0], -values[values < 0]):
        assert close(side.mean(), mean, std, len(side))
        assert abs(side.std() / std - 1) < 5 / math.sqrt(len(side))
        # About 2.3 % lie at the clip, exactly at the largest value.
        assert side.max() == pytest.approx(10 * slope, rel=1e-9)
        assert close((side > 9.9999 * slope).mean(), 0.02275, 0.149, len(side))


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("PosterizeIncreasing", lambda m: 4 - np.floor(0.4 * m)),
        ("SolarizeIncreasing", lambda m: 256 - np.floor(25.6 * m)),
        ("SolarizeAdd", lambda m: np.floor(11 * m)),
    ],
)
def test_one_sided_magnitudes(draws, name, function):
    values = arguments(draws, name)
    mean, std = moments(function)
    assert close(values.mean(), mean, std, len(values))
    assert abs(values.std() / std - 1) < 0.15
    assert set(values) <= set(function(MAGNITUDES))


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "Invert"])
def test_operations_without_magnitude(draws, name):
    assert {a for d in draws for n, a in d if n == name} == {()}


def test_rand_augment_applies_in_order():
    image = picture("smooth")
    for seed in range(40):
        expected = image
        for name, args in ra.sample_operations(np.random.default_rng(seed), probability=1.0):
            expected = ra.OPERATIONS[name][0](expected, *args)
        result = ra.rand_augment(image, np.random.default_rng(seed), probability=1.0)
        np.testing.assert_array_equal(result, expected)
