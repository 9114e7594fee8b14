"""Crops, resizing, erasing rectangles and the whole transforms, against Pillow and definitions."""

import math
import pickle

import numpy as np
import pytest
from PIL import Image

from vssd_jax.data import classification_transforms as transforms

BICUBIC = Image.Resampling.BICUBIC


def picture(height, width, seed=0):
    """Edges, noise and smooth areas: both halves of antialiasing and overshoot matter."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = np.array(Image.fromarray(small).resize((width, height), BICUBIC))
    image[: height // 3] = rng.integers(0, 2, (height // 3, width, 1)) * 255
    return image


def pillow_resize(image, height, width):
    """In two steps, because the order of Pillow's own two passes depends on its version."""
    wide = Image.fromarray(image).resize((width, image.shape[0]), BICUBIC)
    return np.asarray(wide.resize((width, height), BICUBIC)).astype(int)


def close(observed_mean, mean, std, n):
    """Within five standard errors."""
    return abs(observed_mean - mean) < 5 * std / math.sqrt(n)


@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [
        ((375, 500), (224, 224)),
        ((375, 500), (256, 341)),
        ((61, 47), (224, 224)),
        ((224, 224), (224, 224)),
        ((224, 300), (224, 100)),
        ((500, 224), (31, 224)),
        ((3, 400), (64, 64)),
        ((1, 1), (8, 8)),
        ((1500, 1100), (32, 32)),
        ((500, 60), (224, 224)),
    ],
)
@pytest.mark.parametrize("kind", ["mixed", "black and white noise"])
def test_resize_equals_pillow(size_in, size_out, kind):
    image = picture(*size_in)
    if kind != "mixed":  # overshoot everywhere
        image = (np.random.default_rng(1).integers(0, 2, image.shape) * 255).astype(np.uint8)
    result = transforms.resize(image, *size_out)
    difference = np.abs(result - pillow_resize(image, *size_out))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_resize_takes_a_view():
    image = picture(90, 120)
    view = image[10:70, 20:100]
    np.testing.assert_array_equal(
        transforms.resize(view, 32, 48), transforms.resize(view.copy(), 32, 48)
    )


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (300, 300), (100, 90), (257, 643)])
@pytest.mark.parametrize("size", [224, 65])
def test_evaluation_equals_pillow(shape, size):
    image = picture(*shape)
    # The definition, in Pillow: shorter side to size / 0.875, central crop.
    short = math.floor(size / 0.875)
    height, width = shape
    if width <= height:
        resized = Image.fromarray(image).resize((short, int(short * height / width)), BICUBIC)
    else:
        resized = Image.fromarray(image).resize((int(short * width / height), short), BICUBIC)
    left, top = round((resized.width - size) / 2), round((resized.height - size) / 2)
    expected = np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)
    result = transforms.EvalTransform(image_size=size)({"image": image, "label": 3})
    assert result["label"] == 3
    np.testing.assert_array_equal(result["image"], expected)


def test_evaluation_shorter_side_is_256():
    for size, short in [(224, 256), (256, 292), (288, 329), (320, 365), (384, 438)]:
        image = picture(50, 60)
        assert transforms.resize_shorter_side(image, size * 8 // 7).shape[0] == short
        assert short == math.floor(size / 0.875)


@pytest.fixture(scope="module")
def crops():
    rng = np.random.default_rng(7)
    return np.array([transforms.sample_crop(1000, 1000, rng) for _ in range(20_000)])


def test_crop_area_and_aspect(crops):
    """On a square, rectangles of an area above 3/4 may not fit; below, nothing is rejected."""
    height, width = crops.T[2:]
    area = height * width / 1e6
    ratio = np.log(width / height)
    assert area.min() > 0.0795
    assert area.max() <= 1
    assert np.abs(ratio).max() < math.log(4 / 3) + 0.01
    below = area[area < 0.7]
    # Uniform from 0.08 to 0.7.
    assert close(below.mean(), 0.39, 0.62 / math.sqrt(12), len(below))
    assert abs(below.std() / (0.62 / math.sqrt(12)) - 1) < 0.02
    # The log of the ratio is uniform, symmetric about zero, independent of the area.
    spread = 2 * math.log(4 / 3) / math.sqrt(12)
    small = ratio[area < 0.7]
    assert close(small.mean(), 0, spread, len(small))
    assert abs(small.std() / spread - 1) < 0.02
    assert abs(np.corrcoef(small, below)[0, 1]) < 5 / math.sqrt(len(small))


def test_crop_aspect_is_width_by_height():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        crop = transforms.sample_crop(100, 100, rng, area=(0.04, 0.04), aspect=(4.0, 4.0))
        assert crop[2:] == (10, 40)


def test_crop_acceptance(crops):
    """The share of large crops follows from rejecting what does not fit."""
    rng = np.random.default_rng(0)
    area = rng.uniform(0.08, 1, 400_000)
    ratio = np.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3), 400_000))
    fits = (area * ratio <= 1) & (area / ratio <= 1)
    expected = (area[fits] > 0.7).mean()
    share = (crops[:, 2] * crops[:, 3] > 0.7e6).mean()
    assert close(share, expected, math.sqrt(expected * (1 - expected)), len(crops))


def test_crop_positions(crops):
    top, left, height, width = crops.T
    for start, extent in ((top, height), (left, width)):
        assert start.min() >= 0
        assert (start + extent).max() <= 1000
        position = start[extent < 900] / (1000 - extent[extent < 900])
        assert close(position.mean(), 0.5, 1 / math.sqrt(12), len(position))
        assert abs(position.std() * math.sqrt(12) - 1) < 0.02
        assert position.min() < 0.01
        assert position.max() > 0.99


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((10, 1000), (0, 493, 10, 13)),  # wider than 4 / 3: full height, 4 / 3 wide, central
        ((1000, 10), (493, 0, 13, 10)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_crop_falls_back_to_the_centre(shape, expected):
    # An area of the whole picture never fits in a long one.
    rng = np.random.default_rng(0)
    assert transforms.sample_crop(*shape, rng, area=(1.0, 1.0)) == expected


def test_crop_tries_ten_times():
    calls = 0

    class Counting:
        def uniform(self, low, high):
            nonlocal calls
            calls += 1
            return high

    transforms.sample_crop(10, 1000, Counting(), area=(0.9, 1.0))
    assert calls == 20


@pytest.fixture(scope="module")
def boxes():
    rng = np.random.default_rng(11)
    return np.array([transforms.sample_erasing(1000, 1000, rng) for _ in range(40_000)])


def test_erasing_probability(boxes):
    erased = (boxes[:, 2] > 0).mean()
    assert close(erased, 0.25, math.sqrt(0.25 * 0.75), len(boxes))
    assert (boxes[boxes[:, 2] == 0] == 0).all()


def test_erasing_area_aspect_and_position(boxes):
    top, left, height, width = boxes[boxes[:, 2] > 0].T.astype(float)
    area = height * width / 1e6
    n = len(area)
    # A rectangle of 1/3 and aspect 3.3 would be 1054 pixels long: a few are rejected, so compare
    # the moments with the same rejection carried out on the definition.
    rng = np.random.default_rng(1)
    a = rng.uniform(0.02, 1 / 3, 400_000)
    r = np.exp(rng.uniform(math.log(0.3), -math.log(0.3), 400_000))
    fits = (a * r < 1) & (a / r < 1)
    a, r = a[fits], np.log(r[fits])
    assert close(area.mean(), a.mean(), a.std(), n)
    assert abs(area.std() / a.std() - 1) < 0.03
    assert area.min() > 0.0195
    assert area.max() < 0.335
    ratio = np.log(height / width)
    assert close(ratio.mean(), 0, r.std(), n)
    assert abs(ratio.std() / r.std() - 1) < 0.03
    assert np.abs(ratio).max() < -math.log(0.3) + 0.01
    assert height.max() < 1000
    for start, extent in ((top, height), (left, width)):
        position = start / (1000 - extent)
        assert close(position.mean(), 0.5, 1 / math.sqrt(12), n)
        assert abs(position.std() * math.sqrt(12) - 1) < 0.03


def test_train_transform_flips_half_of_the_pictures():
    # A crop of the whole picture, nothing else: the result is the picture or its mirror image.
    transform = transforms.TrainTransform(
        image_size=24,
        crop_area=(1.0, 1.0),
        crop_aspect=(1.0, 1.0),
        randaugment_num_ops=0,
        erase_probability=0,
    )
    image = picture(24, 24)
    flipped = 0
    for seed in range(1000):
        result = transform({"image": image}, np.random.default_rng(seed))["image"]
        if np.array_equal(result, image[:, ::-1]):
            flipped += 1
        else:
            np.testing.assert_array_equal(result, image)
    assert close(flipped / 1000, 0.5, 0.5, 1000)


@pytest.mark.parametrize("shape", [(120, 70), (33, 90)])
def test_train_transform_crops_as_pillow(shape):
    transform = transforms.TrainTransform(
        image_size=40, flip_probability=0, randaugment_num_ops=0, erase_probability=0
    )
    image = picture(*shape)
    for seed in range(20):
        top, left, height, width = transforms.sample_crop(*shape, np.random.default_rng(seed))
        expected = pillow_resize(image[top : top + height, left : left + width], 40, 40)
        result = transform({"image": image}, np.random.default_rng(seed))["image"]
        assert np.abs(result - expected).max() <= 1


def test_train_transform_output():
    image = picture(90, 130)
    before = image.copy()
    transform = pickle.loads(pickle.dumps(transforms.TrainTransform(image_size=40)))
    example = {"image": image, "label": np.int32(5), "replaced": np.int32(0)}
    for seed in range(100):
        result = transform(example, np.random.default_rng(seed))
        again = transform(example, np.random.default_rng(seed))
        assert result["image"].shape == (40, 40, 3)
        assert result["image"].dtype == np.uint8
        assert result["image"].flags.c_contiguous
        assert result["erase"].shape == (4,)
        assert result["erase"].dtype == np.int32
        assert result["label"] == 5
        for key, value in result.items():
            np.testing.assert_array_equal(value, again[key])
    np.testing.assert_array_equal(image, before)


def test_train_transform_settings_reach_their_place():
    image = np.full((40, 40, 3), 90, np.uint8)
    base = {"image_size": 40, "randaugment_num_ops": 0, "erase_probability": 0}

    def run(**settings):
        transform = transforms.TrainTransform(**{**base, **settings})
        return [transform({"image": image}, np.random.default_rng(s)) for s in range(30)]

    assert all((r["image"] == 90).all() and not r["erase"].any() for r in run())
    assert any((r["image"] != 90).any() for r in run(randaugment_num_ops=2))
    assert all(r["erase"].any() for r in run(erase_probability=1.0))
    # Rectangles as high as the picture do not fit.
    for r in run(erase_probability=1.0, erase_area=(0.25, 0.25), erase_aspect=(4.0, 4.0)):
        assert not r["erase"].any()
    for r in run(erase_probability=1.0, erase_area=(0.04, 0.04), erase_aspect=(4.0, 4.0)):
        assert tuple(r["erase"][2:]) == (16, 4)
