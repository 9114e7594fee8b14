"""ADE20K's folders: reading, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from vssd_jax import UserError
from vssd_jax.data.datasets import ade20k

CLASSES = ("wall", "sky", "tree", "road")


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
    label[0] = np.arange(20) % (len(CLASSES) + 1)
    label[1, 3] = 255
    write_pair(tmp_path, "b", image, label)
    write_pair(tmp_path, "a", *blank(8, 9))
    source = ade20k.ADE20K(tmp_path, "training", class_names=CLASSES)
    assert source.image_names == ["a", "b"]
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
    got = ade20k.ADE20K(tmp_path, "training", class_names=CLASSES)[0]["image"]
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
        (blank(value=len(CLASSES) + 1)[1], "holds the label 5; it must lie in 0 to 4", False),
        (_palette(blank()[1]), "is a palette PNG", True),
        (blank()[0], "is a PNG of mode RGB", True),
        (blank()[1].astype(np.uint16), "is a PNG of mode I;16", True),
    ],
)
def test_bad_label_maps_are_named(tmp_path, label, message, in_header):
    write_pair(tmp_path, "a", blank()[0], label)
    source = ade20k.ADE20K(tmp_path, "training", class_names=CLASSES)
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
    source = ade20k.ADE20K(tmp_path, "training", class_names=CLASSES)
    with pytest.raises(UserError, match=kind):
        source[0]


def test_the_150_classes_differ():
    assert len(set(ade20k.CLASSES)) == 150
