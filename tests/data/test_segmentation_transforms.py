"""Crops, mirrors, colours and sizes of pictures with label maps."""

import numpy as np
import pytest

from vssd_jax.data import segmentation_transforms

CLASSES = 4


def marked(height, width, seed=0):
    """An element whose red channel is 10 x (label + 1), in coarse blocks."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, CLASSES, (height // 10, width // 10)), np.ones((10, 10), int))
    image = np.zeros((*label.shape, 3), np.uint8)
    image[..., 0] = 10 * (label + 1)
    return {"image": image, "label": label.astype(np.uint8), "index": 7, "replaced": 0}


def test_train_transform_moves_image_and_labels_together(monkeypatch):
    monkeypatch.setattr(segmentation_transforms, "photometric_distortion", lambda image, rng: image)
    element = marked(60, 90)
    flips = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        out = segmentation_transforms.train_transform(
            element, rng, crop=64, short=60, long=240, max_ratio=1.0
        )
        image, label = out["image"], out["label"]
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.uint8
        assert label.shape == (64, 64)
        assert label.dtype == np.uint8
        red = image[..., 0].astype(int)
        height, width = out["image_shape"]
        real = np.zeros((64, 64), bool)
        real[:height, :width] = True
        np.testing.assert_array_equal(real, label != 255)
        # Nearest and linear resizing differ at the edges of blocks alone.
        same = np.abs(red - 10 * (label.astype(int) + 1)) <= 1
        assert same[real].mean() > 0.7
        assert (image[~real] == 0).all()
        flips.add(len(np.unique(label)))
    again = segmentation_transforms.train_transform(
        element, np.random.default_rng(3), crop=64, short=60, long=240
    )
    twice = segmentation_transforms.train_transform(
        element, np.random.default_rng(3), crop=64, short=60, long=240
    )
    np.testing.assert_array_equal(again["image"], twice["image"])
    np.testing.assert_array_equal(again["label"], twice["label"])


def test_train_transform_flips():
    element = marked(60, 60)
    options = {"crop": 60, "short": 60, "long": 240, "scales": (1.0, 1.0), "max_ratio": 1.0}
    straight, mirrored = (
        segmentation_transforms.train_transform(
            element, np.random.default_rng(0), flip=flip, **options
        )["label"]
        for flip in (0.0, 1.0)
    )
    np.testing.assert_array_equal(straight, element["label"])
    np.testing.assert_array_equal(mirrored, element["label"][:, ::-1])


def test_crops_avoid_one_dominating_class():
    label = np.zeros((100, 300), np.uint8)
    label[:, 140:160] = np.arange(20) % CLASSES
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(50):
        window = label[segmentation_transforms.random_crop_window(label, (50, 50), 0.75, rng)]
        assert window.shape == (50, 50)
        shares.append(np.bincount(window.ravel()).max() / window.size)
    # One crop in six meets the demand; eleven tries find one with probability 0.87.
    assert 0.5 < np.mean(np.array(shares) < 0.75) < 1.0
    only = np.full((80, 80), 255, np.uint8)
    assert only[segmentation_transforms.random_crop_window(only, (50, 50), 0.75, rng)].shape == (
        50,
        50,
    )


@pytest.mark.parametrize(("max_ratio", "windows"), [(0.75, 11), (1.0, 1)])
def test_as_many_windows_are_drawn_as_in_mmsegmentation(max_ratio, windows):
    class Counting:
        draws = 0

        def integers(self, end):
            self.draws += 1
            return self.draws % end

    rng, label = Counting(), np.zeros((200, 200), np.uint8)  # no window meets the demand
    rows, _ = segmentation_transforms.random_crop_window(label, (50, 50), max_ratio, rng)
    assert rng.draws == 2 * windows
    assert rows.start == 2 * windows - 1  # the last one


class Fixed:
    """A generator whose choices are given: the coins, then the amounts."""

    def __init__(self, coins, amounts):
        self.coins, self.amounts = list(coins), list(amounts)

    def integers(self, low, high=None, size=None):
        if high is not None:
            return self.amounts.pop(0)
        taken = [self.coins.pop(0) for _ in range(size or 1)]
        return taken if size else taken[0]

    def uniform(self, low, high):
        amount = self.amounts.pop(0)
        assert low <= amount < high
        return amount


@pytest.mark.parametrize(
    ("coins", "amounts", "expected"),
    [  # coins: brightness, contrast first, [contrast], saturation, hue, [contrast]
        ([0, 0, 0, 0, 0], [], (100, 50, 200)),
        ([1, 0, 0, 0, 0], [30.5], (130, 80, 230)),
        ([1, 0, 0, 0, 0], [-31.0], (69, 19, 169)),
        ([0, 1, 1, 0, 0], [1.4], (140, 70, 255)),
        ([0, 0, 0, 0, 1], [0.5], (50, 25, 100)),
        ([0, 0, 1, 0, 0], [0.5], (150, 125, 200)),
        ([0, 0, 0, 1, 0], [-10], (50, 50, 200)),
    ],
)
def test_photometric_distortion(coins, amounts, expected):
    image = np.full((2, 3, 3), (100, 50, 200), np.uint8)
    got = segmentation_transforms.photometric_distortion(image, Fixed(coins, amounts))
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= 2  # HSV is quantised


def test_eval_transform_keeps_the_whole_image_and_the_original_labels():
    element = marked(60, 90)
    out = segmentation_transforms.eval_transform(
        element, short=40, long=160, ratios=(0.75, 1.0), label_multiple=64
    )
    assert [x.shape for x in out["images"].values()] == [(30, 45, 3), (40, 60, 3)]
    assert {x.dtype for x in out["images"].values()} == {np.dtype(np.uint8)}
    assert out["label"].shape == (64, 128)
    np.testing.assert_array_equal(out["label"][:60, :90], element["label"])
    assert (out["label"][60:] == 255).all()
    assert (out["label"][:, 90:] == 255).all()
    assert out["size"].tolist() == [60, 90]
    assert out["index"] == 7
    stand_in = segmentation_transforms.eval_transform(
        {**element, "like": (30, 20), "replaced": 1}, short=40, long=160, label_multiple=64
    )
    assert stand_in["images"]["0"].shape == (60, 40, 3)
    assert stand_in["label"].shape == (64, 64)
    assert (stand_in["label"] == 255).all()
