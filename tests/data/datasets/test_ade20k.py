"""ADE20K's folders: reading, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from vssd_jax import UserError
from vssd_jax.data.datasets import ade20k
from vssd_jax.data.decode import DecodedSource, UnreadableImage

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
    element = DecodedSource(source)[1]
    assert element["image"].shape == (12, 20, 3)
    assert element["image"].dtype == element["label"].dtype == np.uint8
    assert not source.describe_problems()
    assert element["label"][0, :6].tolist() == [255, 0, 1, 2, 3, 255]
    assert element["label"][1, 3] == 255
    assert element["label"][2, 2] == 0
    assert source.size(1) == (12, 20)


def test_files_that_are_not_read_are_counted(tmp_path):
    write_pair(tmp_path, "a", *blank())
    for name in ("b.JPG", "c.jpeg", ".hidden"):
        (tmp_path / "images" / "training" / name).touch()
    problems = ade20k.ADE20K(tmp_path, "training", class_names=CLASSES).describe_problems()
    assert problems.endswith("by their endings: 1 x .JPG, 1 x .jpeg")


@pytest.mark.parametrize(("shape", "turned"), [((20, 12), True), ((12, 20), False)])
def test_the_label_map_decides_which_way_up_a_photograph_is(tmp_path, shape, turned):
    image, _ = blank()
    image[:6] = 200
    write_pair(tmp_path, "a", image, np.full(shape, 1, np.uint8))
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "images" / "training" / "a.jpg", exif=tags)
    got = DecodedSource(ade20k.ADE20K(tmp_path, "training", class_names=CLASSES))[0]["image"]
    upright = np.rot90(image, -1) if turned else image
    assert np.abs(got.astype(int) - upright).max() < 8  # JPEG


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


def test_pairs_of_different_sizes_are_named(tmp_path):
    write_pair(tmp_path, "a", blank()[0], blank(20, 13)[1])
    source = DecodedSource(ade20k.ADE20K(tmp_path, "training", class_names=CLASSES))
    with pytest.raises(UserError, match=r"a\.jpg \(with .*a\.png\) is 20x12 pixels, .* for 13x20"):
        source[0]


@pytest.mark.parametrize("kind", ["images/training/a.jpg", "annotations/training/a.png"])
@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_damaged_files_are_replaced(tmp_path, kind, content, capfd, monkeypatch):
    monkeypatch.setattr("vssd_jax.data.decode._named", 0)
    for name in "ab":
        write_pair(tmp_path, name, *blank(64, 64))
    path = tmp_path / kind
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    source = ade20k.ADE20K(tmp_path, "training", class_names=CLASSES)
    element = DecodedSource(source)[0]
    assert (element["replaced"], element["index"], element["image"].shape) == (1, 0, (64, 64, 3))
    assert kind in capfd.readouterr().err
    if kind.startswith("annotations") and content is not None:
        with pytest.raises(UnreadableImage, match=kind):
            source.size(0)


def test_the_150_classes_differ():
    assert len(set(ade20k.CLASSES)) == 150
