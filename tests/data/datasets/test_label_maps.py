"""Layouts of pictures and label maps of one's own."""

import io

import numpy as np
import pytest
from PIL import Image

from vssd_jax import UserError
from vssd_jax.config import segmentation_config
from vssd_jax.data.datasets import ade20k, label_maps

NAMES = ("road", "car", "tree", "sky")
SPLITS = {"train": 3, "val": 2}


def pairs(split):
    """Names, pictures and label maps: (H, W) numbers 0 to 3, and 255 where ignored."""
    rng = np.random.default_rng(len(split))
    for number in range(SPLITS[split]):
        label = rng.integers(0, 4, (12, 16)).astype(np.uint8)
        label[0, :3] = 255
        yield f"{split}{number}", rng.integers(0, 255, (12, 16, 3), np.uint8), label


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def ade(root):
    for split, part in (("train", "training"), ("val", "validation")):
        for name, image, label in pairs(split):
            save(root / f"images/{part}/{name}.png", image)
            save(root / f"annotations/{part}/{name}.png", label)


def cityscapes(root):
    for split in SPLITS:
        for name, image, label in pairs(split):
            save(root / f"leftImg8bit/{split}/town/{name}_leftImg8bit.png", image)
            save(root / f"gtFine/{split}/town/{name}_gtFine_labelTrainIds.png", label)
            save(root / f"gtFine/{split}/town/{name}_gtFine_color.png", image)


def voc(root):
    root = root / "VOCdevkit/VOC2012"
    for split in SPLITS:
        names = []
        for name, image, label in pairs(split):
            save(root / f"JPEGImages/{name}.png", image)
            picture = Image.new("P", label.shape[::-1])
            picture.putdata(label.ravel().tolist())
            picture.putpalette([(31 * i) % 256 for i in range(768)])
            (root / "SegmentationClass").mkdir(parents=True, exist_ok=True)
            picture.save(root / f"SegmentationClass/{name}.png")
            names.append(name)
        (root / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    save(root / "JPEGImages/unlabelled.png", image)


def inverse(root):
    for split, part in (("train", "train"), ("val", "valid")):
        for name, image, label in pairs(split):
            save(root / f"{part}/images/{name}.bmp", image)
            save(root / f"{part}/masks/{name}.png", label)


def config_for(root, **fields):
    config = segmentation_config()
    config.dataset = "label_maps"
    config.update({"data_dir": str(root), "class_names": ",".join(NAMES)} | fields)
    return config


@pytest.mark.parametrize("write", [ade, cityscapes, voc, inverse])
@pytest.mark.parametrize("split", SPLITS)
def test_every_layout_gives_the_same_samples(tmp_path, write, split):
    write(tmp_path)
    source = label_maps.open_split(config_for(tmp_path), split)
    assert source.class_names == NAMES
    expected = list(pairs(split))
    assert len(source) == len(expected)
    for sample, (name, image, label) in zip(source, expected, strict=True):
        assert name in sample["name"]
        np.testing.assert_array_equal(sample["label"], label)
        with Image.open(io.BytesIO(sample["image"])) as picture:
            np.testing.assert_array_equal(np.asarray(picture), image)


def test_zero_is_ignored_where_the_config_says_so(tmp_path):
    ade(tmp_path)
    config = config_for(tmp_path, reduce_zero_label=True, class_names="car,tree,sky")
    source = label_maps.open_split(config, "val")
    for sample, (_, _, label) in zip(source, pairs("val"), strict=True):
        expected = np.where((label == 0) | (label == 255), 255, label.astype(int) - 1)
        np.testing.assert_array_equal(sample["label"], expected)
    config = config_for(tmp_path, reduce_zero_label=False)
    as_ade = ade20k.open_split(config, "val")
    assert as_ade.class_names == NAMES
    assert not as_ade.reduce_zero_label


def test_a_share_is_set_aside_by_the_names(tmp_path, capfd):
    for split in SPLITS:
        for name, image, label in pairs(split):
            save(tmp_path / f"images/{name}.jpg", image)
            save(tmp_path / f"labels/{name}.png", label)
    parts = [label_maps.open_split(config_for(tmp_path), split).image_names for split in SPLITS]
    assert sorted(parts[0] + parts[1]) == sorted(name for s in SPLITS for name, _, _ in pairs(s))
    assert len(parts[1]) == 1
    assert "1 of 5 pictures are set aside" in capfd.readouterr().out
    chosen = {
        label_maps.open_split(config_for(tmp_path, seed=seed), "val").image_names[0]
        for seed in range(12)
    }
    assert len(chosen) > 1


def test_names_in_a_file_and_folders_in_fields(tmp_path):
    ade(tmp_path / "data")
    (tmp_path / "names.txt").write_text("road\n car\n\ntree\nsky\n")
    fields = {
        f"{split}_{kind}": str(tmp_path / "data" / folder / part)
        for split, part in (("train", "training"), ("val", "validation"))
        for kind, folder in (("images", "images"), ("labels", "annotations"))
    }
    config = config_for(tmp_path, class_names=str(tmp_path / "names.txt"), **fields)
    source = label_maps.open_split(config, "val")
    assert source.class_names == NAMES
    assert len(source) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"class_names": None}, "class_names is missing: give the names of the labels 0 to 3"),
        ({"class_names": "a,b,a"}, "'a' occurs twice"),
        ({"class_names": "missing.txt"}, "missing.txt cannot be read"),
        ({"train_images": "x"}, "train_images and config.train_labels belong together"),
        ({"val_images": "x", "val_labels": "y"}, "need train_images and train_labels"),
        ({"data_dir": "/nowhere"}, "there is no folder /nowhere"),
    ],
)
def test_what_is_missing_is_said(tmp_path, fields, message):
    ade(tmp_path)
    config = config_for(tmp_path)
    with config.ignore_type():
        config.update(fields)
    with pytest.raises(UserError, match=message):
        label_maps.open_split(config, "train")


def test_an_unknown_layout_says_what_is_there(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match=r"no known layout .* \(there: photos\)"):
        label_maps.open_split(config_for(tmp_path), "train")
