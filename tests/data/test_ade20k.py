"""ADE20K folders: reading, what is refused, and the transforms."""

import numpy as np
import pytest
from PIL import Image

from vssd_jax import UserError
from vssd_jax.data import ade20k, digits_segmentation, segmentation_pictures

CLASSES = 4


def write_pair(root, name, image, label, split="training", **options):
    for kind, array, suffix in (("images", image, "jpg"), ("annotations", label, "png")):
        folder = root / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
        picture.save(folder / f"{name}.{suffix}")


def blank(height=12, width=20, value=1):
    return np.full((height, width, 3), 90, np.uint8), np.full((height, width), value, np.uint8)


def test_reads_pairs_in_order_and_shifts_the_labels(tmp_path):
    image, label = blank()
    label[0] = np.arange(20) % (CLASSES + 1)
    label[1, 3] = 255
    write_pair(tmp_path, "b", image, label)
    write_pair(tmp_path, "a", *blank(8, 9))
    source = ade20k.ADE20K(tmp_path, "training", num_classes=CLASSES)
    assert source.names == ["a", "b"]
    assert [source[i]["index"] for i in range(len(source))] == [0, 1]
    element = source[1]
    assert element["image"].shape == (12, 20, 3)
    assert element["image"].dtype == element["label"].dtype == np.uint8
    assert element["label"][0, :6].tolist() == [255, 0, 1, 2, 3, 255]
    assert element["label"][1, 3] == 255
    assert element["label"][2, 2] == 0
    assert source.size(1) == (12, 20)


def test_images_are_rgb(tmp_path):
    image, label = blank()
    image[:] = (200, 40, 10)
    write_pair(tmp_path, "a", image, label)
    got = ade20k.ADE20K(tmp_path, "training", num_classes=CLASSES)[0]["image"]
    assert np.abs(got.astype(int) - (200, 40, 10)).max() <= 3  # JPEG


def test_missing_pairs_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="images/training cannot be listed"):
        ade20k.ADE20K(tmp_path, "training")
    for name in "ab":
        write_pair(tmp_path, name, *blank())
    (tmp_path / "annotations" / "training" / "b.png").unlink()
    with pytest.raises(UserError, match=r"images/training/b\.jpg without a file in .*annotations"):
        ade20k.ADE20K(tmp_path, "training")
    (tmp_path / "images" / "training" / "a.jpg").unlink()
    (tmp_path / "images" / "training" / "b.jpg").unlink()
    with pytest.raises(UserError, match=r"images/training holds no \.jpg"):
        ade20k.ADE20K(tmp_path, "training")
    write_pair(tmp_path, "c", *blank())
    (tmp_path / "images" / "training" / "c.jpg").rename(tmp_path / "images" / "training" / "a.jpg")
    with pytest.raises(UserError, match=r"annotations/training/c\.png without a file in .*images"):
        ade20k.ADE20K(tmp_path, "training")


def _palette(label):
    picture = Image.fromarray(label).convert("P")
    picture.putpalette([i % 256 for i in range(768)])
    return picture


@pytest.mark.parametrize(
    ("label", "message", "in_header"),
    [
        (blank(20, 12)[1], "has 12x20 pixels and its image 20x12", True),
        (blank(value=CLASSES + 1)[1], "holds the label 5; it must lie in 0 to 4", False),
        (_palette(blank()[1]), "is a palette PNG", True),
        (blank()[0], "is a PNG of mode RGB", True),
        (blank()[1].astype(np.uint16), "is a PNG of mode I;16", True),
    ],
)
def test_bad_label_maps_are_named(tmp_path, label, message, in_header):
    write_pair(tmp_path, "a", blank()[0], label)
    source = ade20k.ADE20K(tmp_path, "training", num_classes=CLASSES)
    with pytest.raises(UserError, match=rf"annotations/training/a\.png {message}"):
        source[0]
    if in_header:
        with pytest.raises(UserError, match=rf"annotations/training/a\.png {message}"):
            source.size(0)


@pytest.mark.parametrize("kind", ["images/training/a.jpg", "annotations/training/a.png"])
@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_damaged_files_are_named(tmp_path, kind, content):
    write_pair(tmp_path, "a", *blank(64, 64))
    path = tmp_path / kind
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    source = ade20k.ADE20K(tmp_path, "training", num_classes=CLASSES)
    with pytest.raises(UserError, match=kind):
        source[0]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (512, 683)), ((640, 480), (683, 512)), ((100, 900), (228, 2048))],
)
def test_fitted_size(size, expected):
    assert ade20k.fitted_size(size, 512, 2048) == expected


def test_fitted_size_in_multiples():
    assert ade20k.fitted_size((480, 640), 512, 2048, 32) == (512, 672)
    assert ade20k.fitted_size((3, 900), 512, 2048, 32) == (32, 2048)


def marked(height, width, seed=0):
    """An element whose red channel is 10 x (label + 1), in coarse blocks."""
    rng = np.random.default_rng(seed)
    label = np.kron(rng.integers(0, CLASSES, (height // 10, width // 10)), np.ones((10, 10), int))
    image = np.zeros((*label.shape, 3), np.uint8)
    image[..., 0] = 10 * (label + 1)
    return {"image": image, "label": label.astype(np.uint8), "index": 7}


def test_train_transform_moves_image_and_labels_together(monkeypatch):
    monkeypatch.setattr(ade20k, "photometric_distortion", lambda image, rng: image)
    element = marked(60, 90)
    flips = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        out = ade20k.train_transform(element, rng, crop=64, short=60, long=240, max_ratio=1.0)
        image, label = out["image"], out["label"]
        assert image.shape == (64, 64, 3)
        assert image.dtype == np.float32
        assert label.shape == (64, 64)
        assert label.dtype == np.uint8
        red = image[..., 0] * ade20k.STD[0] + ade20k.MEAN[0]
        real = label != 255
        # Nearest and linear resizing differ at the edges of blocks alone.
        same = np.abs(red - 10 * (label.astype(int) + 1)) < 1.5
        assert same[real].mean() > 0.7
        assert (image[~real] == 0).all()
        flips.add(len(np.unique(label)))
    again = ade20k.train_transform(element, np.random.default_rng(3), crop=64, short=60, long=240)
    twice = ade20k.train_transform(element, np.random.default_rng(3), crop=64, short=60, long=240)
    np.testing.assert_array_equal(again["image"], twice["image"])
    np.testing.assert_array_equal(again["label"], twice["label"])


def test_train_transform_flips():
    element = marked(60, 60)
    options = {"crop": 60, "short": 60, "long": 240, "scales": (1.0, 1.0), "max_ratio": 1.0}
    straight, mirrored = (
        ade20k.train_transform(element, np.random.default_rng(0), flip=flip, **options)["label"]
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
        window = label[ade20k.random_crop_window(label, (50, 50), 0.75, rng)]
        assert window.shape == (50, 50)
        shares.append(np.bincount(window.ravel()).max() / window.size)
    # One crop in six meets the demand; ten tries find one with probability 0.84.
    assert 0.5 < np.mean(np.array(shares) < 0.75) < 1.0
    only = np.full((80, 80), 255, np.uint8)
    assert only[ade20k.random_crop_window(only, (50, 50), 0.75, rng)].shape == (50, 50)


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
    got = ade20k.photometric_distortion(image, Fixed(coins, amounts))
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= 2  # HSV is quantised


def test_eval_transform_keeps_the_whole_image_and_the_original_labels():
    element = marked(60, 90)
    out = ade20k.eval_transform(element, short=40, long=160, ratios=(0.75, 1.0), label_multiple=64)
    assert [x.shape for x in out["images"].values()] == [(30, 45, 3), (40, 60, 3)]
    assert out["label"].shape == (64, 128)
    np.testing.assert_array_equal(out["label"][:60, :90], element["label"])
    assert (out["label"][60:] == 255).all()
    assert (out["label"][:, 90:] == 255).all()
    assert out["size"].tolist() == [60, 90]
    assert out["index"] == 7


def test_size_grouped_batches_stack_and_hold_every_picture_once(tmp_path):
    shapes = [(40, 60), (60, 40), (40, 60), (80, 120), (40, 60), (50, 50)]
    for i, shape in enumerate(shapes):
        write_pair(tmp_path, f"{i}", *blank(*shape))
    source = ade20k.ADE20K(tmp_path, "training", num_classes=CLASSES)
    options = {"short": 32, "long": 128, "multiple": 8, "label_multiple": 64}
    grouped = ade20k.SizeGrouped(source, 2, **options)
    assert len(grouped) % 2 == 0
    seen = []
    for first in range(0, len(grouped), 2):
        pair = [grouped[first], grouped[first + 1]]
        outs = [ade20k.eval_transform(element, **options) for element in pair]
        np.stack([out["images"]["0"] for out in outs])
        np.stack([out["label"] for out in outs])
        seen += [element["index"] for element in pair if element["valid"]]
    assert sorted(seen) == list(range(6))


def test_digit_scenes(tmp_path):
    sizes = {"training": 3, "validation": 2}
    digits_segmentation.write(tmp_path / "a", sizes=sizes)
    digits_segmentation.write(tmp_path / "b", sizes=sizes)
    with pytest.raises(UserError, match="exists"):
        digits_segmentation.write(tmp_path / "a", sizes=sizes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    present = set()
    for split, count in sizes.items():
        a, b = (ade20k.ADE20K(tmp_path / name, split, num_classes=11) for name in "ab")
        assert len(a) == count
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x["image"], y["image"])
            np.testing.assert_array_equal(x["label"], y["label"])
            present |= set(np.unique(x["label"]).tolist())
    assert 0 in present
    assert max(present) < len(digits_segmentation.CLASSES)
    assert len(present) > 3


def test_an_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits_segmentation.Image.Image, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        digits_segmentation.prepare(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_saved_predictions_read_back_as_annotations(tmp_path):
    labels = np.zeros((30, 40), np.int32)
    labels[10:, 5:] = 2
    image = np.full((30, 40, 3), 128, np.uint8)
    names = ["sky", "sea", "chest of drawers", "flag"]
    segmentation_pictures.save_prediction(tmp_path, "a", image, labels, names)
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["labels/a.png", "overlays/a.png"]
    np.testing.assert_array_equal(
        ade20k.read_labels(tmp_path / "labels" / "a.png", CLASSES), labels
    )
    with Image.open(tmp_path / "overlays" / "a.png") as picture:
        overlay = np.array(picture).astype(int)
    colors = segmentation_pictures.class_colors(4).astype(int)
    assert np.abs(overlay[20, 20] - (0.45 * 128 + 0.55 * colors[2])).max() <= 1
    assert np.abs(overlay[0, 0] - (0.45 * 128 + 0.55 * colors[0])).max() <= 1
    legend = overlay[30:].reshape(-1, 3).tolist()
    present = [colors[i].tolist() in legend for i in range(4)]
    assert present == [True, False, True, False]


def test_the_150_classes_and_their_colors_differ():
    assert len(set(ade20k.CLASSES)) == 150
    assert len({tuple(color) for color in segmentation_pictures.class_colors(150)}) == 150
