"""Pairs of pictures and label maps: reading, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from vssd_jax import UserError, known_classes
from vssd_jax.data.decode import DecodedSource, UnreadableImage
from vssd_jax.data.label_maps import open_folders

CLASSES = ("wall", "sky", "tree", "road")


def write_pair(root, name, image, label, split="training", **options):
    for kind, array, suffix in (("images", image, "jpg"), ("annotations", label, "png")):
        folder = root / kind / split
        folder.mkdir(parents=True, exist_ok=True)
        picture = array if isinstance(array, Image.Image) else Image.fromarray(array)
        picture.save(folder / f"{name}.{suffix}")


def open_pairs(root, **options):
    options = {"class_names": CLASSES, "reduce_zero_label": True} | options
    return open_folders(root / "images/training", root / "annotations/training", **options)


def blank(height=12, width=20, value=1):
    return np.full((height, width, 3), 90, np.uint8), np.full((height, width), value, np.uint8)


def test_reads_pairs_in_order_and_shifts_the_labels(tmp_path):
    image, label = blank()
    label[0] = np.arange(20) % (len(CLASSES) + 1)
    label[1, 3] = 255
    write_pair(tmp_path, "b", image, label)
    write_pair(tmp_path, "a", *blank(8, 9))
    source = open_pairs(tmp_path)
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
    for name in ("b.txt", "c.heic", ".hidden"):
        (tmp_path / "images" / "training" / name).touch()
    problems = open_pairs(tmp_path).describe_problems()
    assert problems.endswith("by their endings: 1 x .heic, 1 x .txt")


@pytest.mark.parametrize(("shape", "turned"), [((20, 12), True), ((12, 20), False)])
def test_the_label_map_decides_which_way_up_a_photograph_is(tmp_path, shape, turned):
    image, _ = blank()
    image[:6] = 200
    write_pair(tmp_path, "a", image, np.full(shape, 1, np.uint8))
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "images" / "training" / "a.jpg", exif=tags)
    got = DecodedSource(open_pairs(tmp_path))[0]["image"]
    upright = np.rot90(image, -1) if turned else image
    assert np.abs(got.astype(int) - upright).max() < 8  # JPEG


def test_missing_pairs_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="images/training cannot be listed"):
        open_pairs(tmp_path)
    for name in "ab":
        write_pair(tmp_path, name, *blank())
    (tmp_path / "annotations" / "training" / "b.png").unlink()
    with pytest.raises(UserError, match=r"images/training/b\.jpg without a file in .*annotations"):
        open_pairs(tmp_path)
    (tmp_path / "images" / "training" / "a.jpg").unlink()
    (tmp_path / "images" / "training" / "b.jpg").unlink()
    with pytest.raises(UserError, match="images/training holds no pictures"):
        open_pairs(tmp_path)
    write_pair(tmp_path, "c", *blank())
    (tmp_path / "images" / "training" / "c.jpg").rename(tmp_path / "images" / "training" / "a.jpg")
    with pytest.raises(UserError, match=r"annotations/training/c\.png without a file in .*images"):
        open_pairs(tmp_path)


@pytest.mark.parametrize(
    ("label", "message", "in_header"),
    [
        (blank(value=len(CLASSES) + 1)[1], "holds the label 5; it must lie in 0 to 4", False),
        (blank()[0], "is a PNG of mode RGB", True),
        (np.full((9, 9), 300, np.uint16), "holds the label 300; it must", False),
    ],
)
def test_bad_label_maps_are_named(tmp_path, label, message, in_header):
    write_pair(tmp_path, "a", blank()[0], label)
    source = open_pairs(tmp_path)
    with pytest.raises(UserError, match=rf"annotations/training/a\.png {message}"):
        source[0]
    if in_header:
        with pytest.raises(UserError, match=rf"annotations/training/a\.png {message}"):
            source.size(0)


def test_pairs_of_different_sizes_are_named(tmp_path):
    write_pair(tmp_path, "a", blank()[0], blank(20, 13)[1])
    source = DecodedSource(open_pairs(tmp_path))
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
    source = open_pairs(tmp_path)
    element = DecodedSource(source)[0]
    assert (element["replaced"], element["index"], element["image"].shape) == (1, 0, (64, 64, 3))
    assert kind in capfd.readouterr().err
    if kind.startswith("annotations") and content is not None:
        with pytest.raises(UnreadableImage, match=kind):
            source.size(0)


def test_palettes_and_other_depths_hold_numbers(tmp_path):
    label = np.arange(240, dtype=np.uint8).reshape(12, 20) % 5
    palette = Image.fromarray(label, "L").convert("P")
    palette.putdata(label.ravel().tolist())
    palette.putpalette([(37 * i) % 256 for i in range(768)])
    expected = np.where(label == 0, 255, label.astype(int) - 1)
    for number, picture in enumerate((label, label.astype(np.uint16), palette)):
        write_pair(tmp_path / str(number), "a", blank()[0], picture)
        np.testing.assert_array_equal(open_pairs(tmp_path / str(number))[0]["label"], expected)
    write_pair(tmp_path / "bits", "a", blank()[0], Image.fromarray(label > 2))
    bits = open_pairs(tmp_path / "bits", reduce_zero_label=False)
    np.testing.assert_array_equal(bits[0]["label"], label > 2)


def test_zero_may_be_a_class_and_any_number_ignored(tmp_path):
    label = np.arange(240, dtype=np.uint8).reshape(12, 20) % 6
    label[0, 0] = 255
    write_pair(tmp_path, "a", blank()[0], label)
    source = open_pairs(tmp_path, reduce_zero_label=False, ignore_label=4)
    with pytest.raises(UserError, match="holds the label 5; it must lie in 0 to 3, or 4 where"):
        source[0]
    got = open_pairs(
        tmp_path, reduce_zero_label=False, ignore_label=5, class_names=(*CLASSES, "sea")
    )[0]["label"]
    np.testing.assert_array_equal(got, np.where(label == 5, 255, label))


def test_jpegs_are_no_label_maps(tmp_path):
    write_pair(tmp_path, "a", *blank())
    label = tmp_path / "annotations/training/a.png"
    Image.open(label).save(label.with_suffix(".jpg"))
    label.unlink()
    with pytest.raises(UserError, match=r"a\.jpg is a JPEG, which changes numbers"):
        open_pairs(tmp_path)[0]


def test_pairs_lie_in_sub_folders_and_have_suffixes(tmp_path):
    write_pair(tmp_path, "a", *blank())
    images, labels = tmp_path / "images/training", tmp_path / "annotations/training"
    for folder in (images, labels):
        (folder / "town").mkdir()
    (images / "a.jpg").rename(images / "town/x_leftImg8bit.JPG")
    (labels / "a.png").rename(labels / "town/x_gtFine_labelTrainIds.png")
    for other in ("x_gtFine_color.png", "x_gtFine_polygons.json"):
        (labels / "town" / other).touch()
    source = open_pairs(tmp_path)
    assert source.image_names == ["town/x"]
    assert source[0]["label"].shape == (12, 20)
    assert "1 x .json" in source.describe_problems()
    assert "1 x name without _gtFine_labelTrainIds" in source.describe_problems()
    with pytest.raises(UserError, match=r"holds no files whose names end with '_mask'"):
        open_pairs(tmp_path, label_suffix="_mask")
    (images / "town/x_leftImg8bit.png").touch()
    with pytest.raises(UserError, match="have the same name"):
        open_pairs(tmp_path)


def test_the_150_classes_differ():
    assert len(set(known_classes.read("ade20k"))) == 150
